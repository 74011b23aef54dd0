"""Rows with named columns: csv, parquet and Arrow files."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.readers import files
from raytune_llm.data.readers.chunks import MAX_ROW_CHARS, Chunk, NumberedRow, Source
from raytune_llm.errors import DataError


def plan_csv(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    passed = 0

    def lines(stream: BinaryIO) -> Iterator[str]:
        nonlocal passed
        for line in stream:
            passed += len(line)
            yield line.decode()

    csv.field_size_limit(MAX_ROW_CHARS)  # Python's own limit is less than a long document
    with files.open_file(file) as stream:
        passed = files.skip_bom(stream)
        rows = csv.reader(lines(stream), strict=True)
        first_row, num_rows = 1, 0
        try:
            columns = tuple(_chosen(file, next(rows, []), None))
            start = passed
            for row in rows:
                num_rows += bool(row)
                if passed - start >= chunk_bytes:
                    yield Chunk(source.kind, file, start, passed, first_row, num_rows, columns)
                    start, first_row, num_rows = passed, first_row + num_rows, 0
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{file}, row {first_row + num_rows}", f"is not valid csv ({error})", "Save the file as UTF-8 csv."
            ) from None
        if num_rows:
            yield Chunk(source.kind, file, start, passed, first_row, num_rows, columns)


def read_csv(chunk: Chunk, wanted: Collection[str] | None) -> Iterator[NumberedRow]:
    csv.field_size_limit(MAX_ROW_CHARS)  # Python's own limit is less than a long document
    with files.open_file(chunk.file) as stream:
        stream.seek(chunk.start)
        text = stream.read(chunk.end - chunk.start).decode()
    rows = (row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row)
    for number, row in enumerate(rows, chunk.first_row):
        if len(row) == len(chunk.columns):
            yield number, dict(zip(chunk.columns, row, strict=True))
        else:
            yield number, BadRow("the row has another number of fields than the header", f"{len(row)}, not {len(chunk.columns)}")


def plan_parquet(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    from pyarrow.parquet import ParquetFile

    try:
        with files.open_arrow(file) as opened, ParquetFile(opened) as parquet:
            groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            num_rows = parquet.metadata.num_rows
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow raises many kinds of errors for a damaged footer
        raise _unreadable(file, "is not a parquet file", error) from None
    if num_rows != sum(groups) or min(groups, default=0) < 0:
        raise DataError(file, "is not a parquet file (its footer contradicts itself)", "Write it again.")
    yield from _chunks_of_rows(source, file, num_rows, chunk_bytes)


def _chunks_of_rows(source: Source, file: str, num_rows: int, chunk_bytes: int) -> Iterator[Chunk]:
    rows_per_chunk = max(1, num_rows * chunk_bytes // files.size(file))
    for start in range(0, num_rows, rows_per_chunk):
        end = min(start + rows_per_chunk, num_rows)
        yield Chunk(source.kind, file, start, end, start + 1, end - start)


def read_parquet(chunk: Chunk, wanted: Collection[str] | None) -> Iterator[NumberedRow]:
    passed = 0
    try:
        for first, batch, names in _parquet_batches(chunk, wanted):
            passed = first
            yield from _rows_of_batch(batch, passed, chunk, names)
            passed += batch.num_rows
    except (DataError, FileNotFoundError):
        raise
    except Exception as error:
        raise _unreadable(f"{chunk.file}, after row {passed}", "can't be read", error) from None
    if passed < chunk.end:
        raise DataError(f"{chunk.file}, after row {passed}", "holds fewer rows than its footer says", "Write the file again.")


def _parquet_batches(chunk: Chunk, wanted: Collection[str] | None) -> Iterator[tuple[int, Any, list[str]]]:
    """Yields (rows before the batch, batch, names of all columns) for the row groups that the chunk touches."""
    from pyarrow.parquet import ParquetFile

    with files.open_arrow(chunk.file) as opened, ParquetFile(opened) as parquet:
        names = parquet.schema_arrow.names
        columns = _chosen(chunk.file, names, wanted)
        passed = 0
        for group in range(parquet.num_row_groups):
            group_rows = parquet.metadata.row_group(group).num_rows
            if passed + group_rows > chunk.start and passed < chunk.end:
                for batch in parquet.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                    yield passed, batch.select(columns), names
                    passed += batch.num_rows
            else:
                passed += group_rows


def plan_arrow(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    try:
        num_rows = sum(batch.num_rows for batch, _ in _arrow_batches(file, ()))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise _unreadable(file, "is not an arrow file", error) from None
    yield from _chunks_of_rows(source, file, num_rows, chunk_bytes)


def read_arrow(chunk: Chunk, wanted: Collection[str] | None) -> Iterator[NumberedRow]:
    passed = 0
    try:
        for batch, names in _arrow_batches(chunk.file, wanted):
            yield from _rows_of_batch(batch, passed, chunk, names)
            passed += batch.num_rows
    except (DataError, FileNotFoundError):
        raise
    except Exception as error:
        raise _unreadable(f"{chunk.file}, after row {passed}", "can't be read", error) from None


def _arrow_batches(file: str, wanted: Collection[str] | None) -> Iterator[tuple[Any, list[str]]]:
    """Yields (record batch, names of all columns) of an Arrow file, memory-mapped, with only the wanted columns.

    Both of Arrow's formats are read, the file format and the streaming format, which `datasets` writes.
    """
    import pyarrow as pa

    with files.open_arrow(file) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
        with opened(mapped) as reader:
            names = reader.schema.names
        columns = _chosen(file, names, wanted)
        options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
        mapped.seek(0)
        with opened(mapped, options=options) as reader:
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                yield batch, names


def _chosen(file: str, names: list[str], wanted: Collection[str] | None) -> list[str]:
    """The wanted columns among these names. Raises DataError if the file has one of them twice."""
    chosen = [name for name in names if wanted is None or name in wanted]
    twice = sorted(name for name, count in Counter(chosen).items() if count > 1)
    if twice:
        raise DataError(file, f"names the column {twice[0]!r} twice", "Rename one of the two.")
    return chosen


def _rows_of_batch(batch: Any, passed: int, chunk: Chunk, names: Sequence[str]) -> Iterator[NumberedRow]:
    """The chunk's rows in a record batch. passed: the number of the file's rows before the batch."""
    first, last = max(chunk.start - passed, 0), min(chunk.end - passed, batch.num_rows)
    if first >= last:
        return
    _check_layout(batch)
    mine = batch.slice(first, last - first)
    empty = dict.fromkeys(names)
    try:
        rows = [{**empty, **row} for row in _as_json(mine)]
    except Exception:  # Python can't represent a value, such as a date in the year 10000: convert row by row
        rows = [_row(mine, number, empty) for number in range(len(mine))]
    yield from enumerate(rows, passed + first + 1)


def _row(batch: Any, number: int, empty: Mapping[str, Any]) -> Any:
    try:
        return {**empty, **_as_json(batch.slice(number, 1))[0]}
    except UnicodeDecodeError as error:
        return BadRow("a text is not UTF-8", str(error))
    except Exception as error:
        return BadRow("the row holds a value that can't be read", f"{type(error).__name__}: {error}")


def _as_json(batch: Any) -> list[dict[str, Any]]:
    """The rows as JSON values: maps are objects, and an object lacks the keys that the table added for other rows (unpadded)."""
    if not batch.num_columns:
        return [{} for _ in range(batch.num_rows)]
    rows = batch.to_pylist(maps_as_pydicts="lossy")
    for field in batch.schema:
        if field.type.num_fields:  # nested
            for row in rows:
                row[field.name] = unpadded(row[field.name])
    return rows


def unpadded(value: Any) -> Any:
    """The value without the nulls of objects: tables have each key in every row, and null where a row lacks it."""
    if isinstance(value, dict):
        return {key: unpadded(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [unpadded(item) for item in value]
    return value


def _check_layout(batch: Any) -> None:
    """Raises ArrowInvalid if an offset points outside the data of a damaged file, where reading would crash the process."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except ValueError as error:
            if "UTF8" not in str(error):
                raise
            _as_bytes(column).validate(full=True)  # as bytes, since rows with invalid UTF-8 are skipped one by one


def _as_bytes(array: Any) -> Any:
    """The array with its texts as bytes, without copying."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_string(kind):
        return array.view(pa.binary())
    if pa.types.is_large_string(kind):
        return array.view(pa.large_binary())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _as_bytes(array.values)
        new = pa.list_(inner.type) if pa.types.is_list(kind) else pa.large_list(inner.type)
        return pa.Array.from_buffers(new, len(array), array.buffers()[:2], offset=array.offset, children=[inner])
    if pa.types.is_struct(kind):
        children = [_as_bytes(array.field(number)) for number in range(kind.num_fields)]
        return pa.StructArray.from_arrays(children, names=[str(number) for number in range(kind.num_fields)])
    return array


def _unreadable(where: str, problem: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    encrypted = re.search("decrypt|encrypt", reason, re.IGNORECASE)
    return DataError(where, f"{problem} ({reason})", "Write it without encryption." if encrypted else "Write the file again.")

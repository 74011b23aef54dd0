"""Rows with named columns: csv, parquet and Arrow files."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
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
            columns = tuple(next(rows, ()))
            _check_names(file, columns)
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


def read_csv(chunk: Chunk) -> Iterator[NumberedRow]:
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
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with files.open_arrow(file) as opened, ParquetFile(opened) as parquet:
            num_rows = parquet.metadata.num_rows
            _check_names(file, parquet.schema_arrow.names)
    except ArrowInvalid as error:
        raise DataError(file, f"is not a parquet file ({error})", "Write it again.") from None
    yield from _chunks_of_rows(source, file, num_rows, chunk_bytes)


def _chunks_of_rows(source: Source, file: str, num_rows: int, chunk_bytes: int) -> Iterator[Chunk]:
    rows_per_chunk = max(1, num_rows * chunk_bytes // files.size(file))
    for start in range(0, num_rows, rows_per_chunk):
        end = min(start + rows_per_chunk, num_rows)
        yield Chunk(source.kind, file, start, end, start + 1, end - start)


def read_parquet(chunk: Chunk) -> Iterator[NumberedRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    passed = 0
    try:
        with files.open_arrow(chunk.file) as opened, ParquetFile(opened) as parquet:
            for group in range(parquet.num_row_groups):
                group_rows = parquet.metadata.row_group(group).num_rows
                if passed + group_rows > chunk.start and passed < chunk.end:
                    for batch in parquet.iter_batches(batch_size=1024, row_groups=[group]):
                        yield from _rows_of_batch(batch, passed, chunk)
                        passed += batch.num_rows
                else:
                    passed += group_rows
    except (ArrowException, OSError) as error:
        raise DataError(f"{chunk.file}, after row {passed}", f"can't be read ({error})", "Write the file again.") from None


def _rows_of_batch(batch: Any, passed: int, chunk: Chunk) -> Iterator[NumberedRow]:
    """The chunk's rows in a record batch that comes after so many rows."""
    first, last = max(chunk.start - passed, 0), min(chunk.end - passed, batch.num_rows)
    if first < last:
        mine = batch.slice(first, last - first)
        try:
            rows = mine.to_pylist()
        except UnicodeDecodeError:
            rows = [_row(mine, number) for number in range(len(mine))]
        yield from enumerate(rows, passed + first + 1)


def _row(batch: Any, number: int) -> Any:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("a text is not UTF-8", str(error))


def plan_arrow(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    from pyarrow import ArrowInvalid

    try:
        num_rows = sum(batch.num_rows for batch in _arrow_batches(file, check=True))
    except (ArrowInvalid, OSError) as error:
        raise DataError(file, f"is not an arrow file ({error})", "Write it again.") from None
    yield from _chunks_of_rows(source, file, num_rows, chunk_bytes)


def read_arrow(chunk: Chunk) -> Iterator[NumberedRow]:
    passed = 0
    for batch in _arrow_batches(chunk.file):
        yield from _rows_of_batch(batch, passed, chunk)
        passed += batch.num_rows


def _arrow_batches(file: str, *, check: bool = False) -> Iterator[Any]:
    """Record batches of either form that Arrow has for disks and pipes; `datasets` writes the latter. Memory-mapped."""
    import pyarrow as pa

    with files.open_arrow(file) as mapped:
        if mapped.read(6) == b"ARROW1":
            with pa.ipc.open_file(mapped) as reader:
                if check:
                    _check_names(file, reader.schema.names)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        mapped.seek(0)
        with pa.ipc.open_stream(mapped) as reader:
            if check:
                _check_names(file, reader.schema.names)
            yield from reader


def _check_names(file: str, columns: Sequence[str]) -> None:
    twice = sorted(name for name, count in Counter(columns).items() if count > 1)
    if twice:
        raise DataError(file, f"names the column {twice[0]!r} twice", "Rename one of the two.")

"""Raw rows from files, folders and hub data sets, in chunks.

A chunk is what one task prepares and one shard of the token store holds. Where chunks end depends on the data alone, never on
the number of cores, so that the same data always make the same shards. Memory is that of one chunk, whatever the file's size.

Every row is known by its file and its number in it, counted from 1 (for jsonl and txt: the line).
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from raytune_llm.data import files
from raytune_llm.data.dropped import BadRow
from raytune_llm.errors import DataError, ResourceError
from raytune_llm.hub import ask_hub

MIN_CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 64 << 20
NUM_CHUNKS = 64
"""Aimed at, between those bounds."""
READ_BYTES = 1 << 20
MAX_ROW_CHARS = 1 << 27
"""Of a JSON array's element and of a csv field: where the end is missing, the rest of the file is not read to the last byte."""
NumberedRow = tuple[int, Any]
"""The row's number and its columns by name, or the BadRow that says why there are none."""


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one type in order, or one hub data set."""

    kind: str
    files: tuple[str, ...]
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    """Of a hub data set, where its files lie in one."""
    hub: str = "huggingface"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of one file, from `start` to `end`: bytes for text files, rows for parquet, arrow and hub data sets."""

    kind: str
    file: str
    start: int
    end: int
    first_row: int
    num_rows: int
    columns: tuple[str, ...] = ()
    """Of a csv file, whose header stands in its first chunk only."""
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    hub: str = "huggingface"
    picks: tuple[int, ...] | None = None
    """Which of its rows are meant, counted from 0 and ascending; one that is there twice comes twice. None: all."""

    @property
    def num_picked(self) -> int:
        return self.num_rows if self.picks is None else len(self.picks)


def find(
    path: str, *, subset: str | None = None, split: str = "train", folder: str | None = None, hub: str = "huggingface"
) -> Source:
    """What `data.path` names: a file, a folder of files of one type (sorted by name), either also by address, or a hub data set
    id."""
    if files.is_address(path):
        return _of_files(path, files.found_at(path))
    here = Path(path).expanduser()
    if here.is_file():
        return _of_files(path, [str(here)])
    if here.is_dir():
        below = sorted(file for file in here.rglob("*") if file.is_file() and not file.name.startswith("."))
        return _of_files(path, [str(file) for file in below])
    if here.suffix.lower() in KIND_OF_SUFFIX or path.startswith(("/", "~", ".")) or not _HUB_ID.fullmatch(path):
        raise _missing(path, here)
    return Source("hub", (path,), subset, split, folder, hub)


def _of_files(path: str, found: list[str]) -> Source:
    suffixes = sorted({PurePosixPath(file).suffix.lower() for file in found})
    if not found:
        raise DataError(path, "the folder holds no files", f"Put {_types()} files there.")
    if len(suffixes) > 1:
        raise DataError(path, f"the folder mixes files of several types: {', '.join(suffixes)}", "Name one file, or part them.")
    return Source(_kind(found[0]), tuple(found))


_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
KIND_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}


TEXTS = ("json", "lines", "csv", "text")
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh91AY&SY": "bzip2", b"\xfd7zXZ\x00": "xz"}
"""What a packed file starts with, whatever its name."""


def _types() -> str:
    return ", ".join(KIND_OF_SUFFIX)


def _kind(file: str) -> str:
    start = _first_bytes(file)
    if packed := next((name for magic, name in PACKED.items() if start.startswith(magic)), None):
        raise DataError(file, f"is packed ({packed})", "Unpack it first.")
    suffix = PurePosixPath(file).suffix
    kind = KIND_OF_SUFFIX.get(suffix.lower())
    if kind is None:
        raise DataError(file, f"has a type that is not read ({suffix or 'no suffix'}); there are {_types()}", "Convert it.")
    if kind in TEXTS and start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise DataError(file, "is UTF-16", "Save it as UTF-8.")
    first = start.removeprefix(BOM_UTF8).lstrip()[:1]
    # One object a line, or an array, under the other's suffix.
    return "lines" if kind == "json" and first == b"{" else "json" if kind == "lines" and first == b"[" else kind


def _first_bytes(file: str) -> bytes:
    with files.open_file(file) as stream:
        return stream.read(4096)


def _missing(path: str, here: Path) -> DataError:
    folder = here.parent
    while not folder.is_dir():
        folder = folder.parent
    near = difflib.get_close_matches(here.name, [entry.name for entry in folder.iterdir()], n=1)
    hint = (
        f"Did you mean {folder / near[0]}?" if near else "Check data.path; it is taken from the folder that the command runs in."
    )
    return DataError(path, "there is no such file or folder", hint)


def fingerprint(source: Source) -> str:
    """A hash of the contents: of the files' bytes in order, whatever their names, or of a hub data set's revision."""
    digest = hashlib.sha256(source.kind.encode())
    if source.kind == "hub":
        digest.update(
            f"{source.files[0]} {source.subset} {source.split} {HUBS[source.hub](source.files[0], source)._fingerprint}".encode()
        )
        return digest.hexdigest()
    for file in source.files:
        digest.update(files.contents_hash(file))
    return digest.hexdigest()


def plan(source: Source, max_rows: int | None = None, *, part: str | None = None, num_samples: int | None = None) -> list[Chunk]:
    """The chunks of a source in order, with the rows in each.

    Of the first max_rows rows only, where given. `part` is a split as LLaMA-Factory and `datasets` write it, train[:100] or
    train[10%:20%]; num_samples draws so many of its rows, the same ones for the same number of rows.
    """
    start, stop = _part(part)
    whole = (start, stop) == (None, None) and num_samples is None
    chunks = _plan_whole(source, max_rows if whole else None)
    if whole:
        return chunks
    num_rows = sum(chunk.num_rows for chunk in chunks)
    first, last = (_bound(edge, num_rows) for edge in (start or "0", stop or "100%"))
    chosen = np.arange(first, max(first, last))
    if num_samples is not None and len(chosen):
        draw = np.random.Generator(np.random.PCG64(num_rows))
        chosen = np.concatenate([draw.permutation(chosen), draw.choice(chosen, max(num_samples - len(chosen), 0))])
        chosen = np.sort(chosen[: min(num_samples, max_rows or num_samples)])
    chosen = chosen[:max_rows]
    picked: list[Chunk] = []
    passed = 0
    for chunk in chunks:
        inside = chosen[(chosen >= passed) & (chosen < passed + chunk.num_rows)] - passed
        passed += chunk.num_rows
        if len(inside):
            picked.append(replace(chunk, picks=tuple(inside.tolist())))
    if not picked:
        raise DataError(", ".join(source.files[:3]), f"holds no rows in {part}", "Correct data.split.")
    return picked


_PART = re.compile(r"\w+(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def _part(split: str | None) -> tuple[str | None, str | None]:
    """The bounds of train[a:b], or none."""
    if split is None:
        return None, None
    found = _PART.fullmatch(split.replace(" ", ""))
    if found is None:
        raise DataError(f"data.split={split}", "is no split", "Say, train, train[:1000] or train[10%:20%].")
    return found[1], found[2]


def _bound(edge: str, num_rows: int) -> int:
    """A row number; negative and percent count from the end and of the whole."""
    number = round(int(edge[:-1]) * num_rows / 100) if edge.endswith("%") else int(edge)
    return min(max(number + num_rows if number < 0 else number, 0), num_rows)


def _plan_whole(source: Source, max_rows: int | None) -> list[Chunk]:
    planner = PLANNERS[source.kind]
    total_bytes = 0 if source.kind == "hub" else sum(files.size(file) for file in source.files)
    chunk_bytes = min(max(total_bytes // NUM_CHUNKS, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
    chunks: list[Chunk] = []
    left = max_rows
    for file in source.files:
        for chunk in planner(source, file, chunk_bytes):
            chunks.append(chunk if left is None else replace(chunk, num_rows=min(chunk.num_rows, left)))
            if left is not None:
                left -= chunks[-1].num_rows
                if left == 0:
                    return chunks
    if not chunks:
        raise DataError(", ".join(source.files[:3]), "holds no rows", "Give data.path a file with at least one row.")
    return chunks


def read(chunk: Chunk) -> Iterator[NumberedRow]:
    """The rows of a chunk with their numbers."""
    rows = READERS[chunk.kind](chunk)
    numbered = enumerate(row for _, row in zip(range(chunk.num_rows), rows, strict=False))
    if chunk.picks is None:
        yield from (row for _, row in numbered)
        return
    times = Counter(chunk.picks)
    for offset, row in numbered:
        yield from repeat(row, times[offset])


def where(chunk: Chunk, row: int) -> str:
    return f"{chunk.file}, row {row}"


# Lines: jsonl and txt -------------------------------------------------------------------------------------------------


def _plan_lines(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    with files.open_file(file) as stream:
        start = end = _skip_bom(stream)
        first_line = line_number = 1
        num_rows = 0
        for line in stream:
            num_rows += not line.isspace()
            end += len(line)
            line_number += 1
            if end - start >= chunk_bytes:
                if num_rows:
                    yield Chunk(source.kind, file, start, end, first_line, num_rows)
                start, first_line, num_rows = end, line_number, 0
        if num_rows:
            yield Chunk(source.kind, file, start, end, first_line, num_rows)


def _numbered_lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    with files.open_file(chunk.file) as stream:
        stream.seek(chunk.start)
        number = chunk.first_row
        while stream.tell() < chunk.end:
            line = stream.readline()
            if not line.isspace():
                yield number, line
            number += 1


def _read_json_lines(chunk: Chunk) -> Iterator[NumberedRow]:
    for number, line in _numbered_lines(chunk):
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            yield number, BadRow("the line is not valid JSON", str(error))


def _read_text_lines(chunk: Chunk) -> Iterator[NumberedRow]:
    for number, line in _numbered_lines(chunk):
        try:
            yield number, {"text": line.decode().rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield number, BadRow("the line is not UTF-8", str(error))


# JSON arrays ----------------------------------------------------------------------------------------------------------


class _JsonArray:
    """The elements of a JSON array read in pieces, with the byte at which each ends.

    json's decoder wants an element whole, so the buffer grows until the element at its head is complete.
    """

    _BETWEEN = re.compile(r"[\s,]*")

    def __init__(self, stream: BinaryIO, file: str, first_row: int) -> None:
        self.stream, self.file, self.row = stream, file, first_row
        self.bytes_passed = stream.tell()
        self.decode_utf8 = getincrementaldecoder("utf-8")()
        self.decode_json = json.JSONDecoder().raw_decode
        self.buffer, self.head, self.ended, self.closed = "", 0, False, False

    def __iter__(self) -> Iterator[Any]:
        while True:
            self._pass_between()
            if self.head == len(self.buffer):
                return
            if self.buffer[self.head] == "]":
                self.closed = True
                return
            yield self._element()
            self.row += 1

    def offset(self) -> int:
        """Bytes of the file up to the end of the element just yielded."""
        self._drop_passed()
        return self.bytes_passed

    def _pass_between(self) -> None:
        while True:
            match = self._BETWEEN.match(self.buffer, self.head)
            assert match is not None
            self.head = match.end()
            if self.head < len(self.buffer) or not self._grow():
                return

    def _element(self) -> Any:
        while True:
            try:
                value, head = self.decode_json(self.buffer, self.head)
            except json.JSONDecodeError as error:
                if len(self.buffer) - self.head > MAX_ROW_CHARS:
                    problem = f"has no end within {MAX_ROW_CHARS:,} characters"
                    raise DataError(f"{self.file}, row {self.row}", problem, "Mend the file, or save it as jsonl.") from None
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16
                if cut_off and self._grow():
                    continue
                problem = "the file ends in the middle of this row" if cut_off else f"is not valid JSON ({error.msg})"
                raise DataError(f"{self.file}, row {self.row}", problem, "Mend the file, or save it as jsonl.") from None
            self.head = head
            return value

    def _grow(self) -> bool:
        if self.ended:
            return False
        self._drop_passed()
        data = self.stream.read(max(READ_BYTES, len(self.buffer)))
        self.ended = not data
        try:
            self.buffer += self.decode_utf8.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.file}, row {self.row}", f"is not UTF-8 ({error.reason})", "Save the file as UTF-8.") from None
        return True

    def _drop_passed(self) -> None:
        self.bytes_passed += len(self.buffer[: self.head].encode())
        self.buffer, self.head = self.buffer[self.head :], 0


def _plan_json(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    with files.open_file(file) as stream:
        _skip_bom(stream)
        opening = stream.read(1)
        while opening.isspace():
            opening = stream.read(1)
        if not opening:
            return
        if opening != b"[":
            raise DataError(
                file, "must hold an array of rows, or one object a line", "Save the rows as a JSON array or as jsonl."
            )
        array = _JsonArray(stream, file, first_row=1)
        start, first_row, num_rows = stream.tell(), 1, 0
        for _ in array:
            num_rows += 1
            # A cheap lower bound first: the exact offset costs an encoding of what was passed.
            if stream.tell() - start >= chunk_bytes and (end := array.offset()) - start >= chunk_bytes:
                yield Chunk(source.kind, file, start, end, first_row, num_rows)
                start, first_row, num_rows = end, first_row + num_rows, 0
        if not array.closed:
            raise DataError(f"{file}, row {array.row}", "the file ends before the array's closing bracket", "Fetch it again.")
        if num_rows:
            yield Chunk(source.kind, file, start, array.offset(), first_row, num_rows)


def _read_json(chunk: Chunk) -> Iterator[NumberedRow]:
    with files.open_file(chunk.file) as stream:
        stream.seek(chunk.start)
        part = io.BytesIO(stream.read(chunk.end - chunk.start))
    yield from enumerate(_JsonArray(part, chunk.file, chunk.first_row), chunk.first_row)


# csv ------------------------------------------------------------------------------------------------------------------


def _plan_csv(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    passed = 0

    def lines(stream: BinaryIO) -> Iterator[str]:
        nonlocal passed
        for line in stream:
            passed += len(line)
            yield line.decode()

    csv.field_size_limit(MAX_ROW_CHARS)  # Python's own limit is less than a long document
    with files.open_file(file) as stream:
        passed = _skip_bom(stream)
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


def _read_csv(chunk: Chunk) -> Iterator[NumberedRow]:
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


# parquet and arrow ----------------------------------------------------------------------------------------------------


def _plan_parquet(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
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


def _read_parquet(chunk: Chunk) -> Iterator[NumberedRow]:
    from pyarrow.parquet import ParquetFile

    with files.open_arrow(chunk.file) as opened, ParquetFile(opened) as parquet:
        passed = 0
        for group in range(parquet.num_row_groups):
            group_rows = parquet.metadata.row_group(group).num_rows
            if passed + group_rows > chunk.start and passed < chunk.end:
                for batch in parquet.iter_batches(batch_size=1024, row_groups=[group]):
                    yield from _rows_of_batch(batch, passed, chunk)
                    passed += batch.num_rows
            else:
                passed += group_rows


def _rows_of_batch(batch: Any, passed: int, chunk: Chunk) -> Iterator[NumberedRow]:
    """The chunk's rows in a record batch that comes after so many rows."""
    first, last = max(chunk.start - passed, 0), min(chunk.end - passed, batch.num_rows)
    if first < last:
        yield from enumerate(batch.slice(first, last - first).to_pylist(), passed + first + 1)


def _plan_arrow(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    from pyarrow import ArrowInvalid

    try:
        num_rows = sum(batch.num_rows for batch in _arrow_batches(file, check=True))
    except (ArrowInvalid, OSError) as error:
        raise DataError(file, f"is not an arrow file ({error})", "Write it again.") from None
    yield from _chunks_of_rows(source, file, num_rows, chunk_bytes)


def _read_arrow(chunk: Chunk) -> Iterator[NumberedRow]:
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


# Hub data sets --------------------------------------------------------------------------------------------------------

HUB_CHUNK_BYTES = 16 << 20


def _huggingface_rows(name: str, part: Source | Chunk) -> Any:
    """The whole data set that the part belongs to."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    address, state = ask_hub()
    if state == "not reached":
        raise DataError(
            name,
            f"there is no such file or folder, and no hub answers at {address}",
            "Check data.path, or set HF_ENDPOINT to a hub that this machine reaches; with HF_HUB_OFFLINE=1 what was fetched "
            "before is taken.",
        )
    try:
        return load_dataset(name, part.subset, split=part.split, data_dir=part.folder)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DataError(
            name,
            f"there is no such file or folder, and the hub gives no data set of that name ({reason})",
            "Check data.path, data.subset and data.split, and that the hub is reached (HF_ENDPOINT, HF_TOKEN).",
        ) from None


def _modelscope_rows(name: str, part: Source | Chunk) -> Any:
    """The whole data set that the part belongs to, as `datasets` has it."""
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise ResourceError(
            f"data.hub=modelscope needs the package modelscope ({error})", "pip install 'raytune-llm[modelscope]'."
        ) from None
    try:
        rows = MsDataset.load(name, subset_name=part.subset, split=part.split, data_dir=part.folder)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise DataError(
            name,
            f"there is no such file or folder, and ModelScope gives no data set of that name ({reason})",
            "Check data.path, data.subset and data.split, and that the hub is reached (MODELSCOPE_API_TOKEN for private ones).",
        ) from None
    return rows.to_hf_dataset() if isinstance(rows, MsDataset) else rows


def _plan_hub(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    rows = HUBS[source.hub](file, source)
    rows_per_chunk = max(1, len(rows) * HUB_CHUNK_BYTES // max(rows.data.nbytes, 1))
    for start in range(0, len(rows), rows_per_chunk):
        end = min(start + rows_per_chunk, len(rows))
        chunk = Chunk(source.kind, file, start, end, start + 1, end - start)
        yield replace(chunk, subset=source.subset, split=source.split, folder=source.folder, hub=source.hub)


def _read_hub(chunk: Chunk) -> Iterator[NumberedRow]:
    rows = HUBS[chunk.hub](chunk.file, chunk)
    for number in range(chunk.start, chunk.end):
        yield number + 1, rows[number]


# Axes -----------------------------------------------------------------------------------------------------------------


def _skip_bom(stream: BinaryIO) -> int:
    """Past the byte-order mark, if there is one; the position after it."""
    if stream.read(len(BOM_UTF8)) != BOM_UTF8:
        stream.seek(0)
    return stream.tell()


HUBS = {"huggingface": _huggingface_rows, "modelscope": _modelscope_rows}
PLANNERS = {
    "json": _plan_json,
    "lines": _plan_lines,
    "text": _plan_lines,
    "csv": _plan_csv,
    "parquet": _plan_parquet,
    "arrow": _plan_arrow,
    "hub": _plan_hub,
}
READERS = {
    "json": _read_json,
    "lines": _read_json_lines,
    "text": _read_text_lines,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "hub": _read_hub,
}

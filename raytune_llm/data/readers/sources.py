"""Raw rows from files, folders and hub data sets, in chunks.

A chunk is what one task prepares and one shard of the token store holds. Where chunks end depends on the data alone, never on
the number of cores, so that the same data always make the same shards. Memory is that of one chunk, whatever the file's size.

Every row is known by its file and its number in it, counted from 1 (for jsonl and txt: the line).
"""

from __future__ import annotations

import difflib
import hashlib
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path, PurePosixPath

import numpy as np

from raytune_llm.data.readers import PLANNERS, READERS, files, hubs
from raytune_llm.data.readers.chunks import Chunk, NumberedRow, Source
from raytune_llm.errors import DataError

MIN_CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 64 << 20
NUM_CHUNKS = 64
"""Aimed at, between those bounds."""
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
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
    text = start.removeprefix(BOM_UTF8).lstrip()
    first = text[:1]
    if kind in ("json", "lines") and text.partition(b"\n")[0].strip() == b"{":
        raise DataError(file, "holds an object over several lines", "Save the rows as a JSON array, or as one object a line.")
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
        digest.update(f"{source.files[0]} {source.subset} {source.split} {hubs.fingerprint(source)}".encode())
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

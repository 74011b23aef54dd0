"""Finds files, folders and hub data sets, and reads their raw rows in chunks.

One task prepares a chunk, and it becomes one shard of the token store. Chunk borders depend only on the data, not on the number
of cores, so the same data always give the same shards. A task needs memory for one chunk, whatever the size of the file.

A row is identified by its file and its number in it, counted from 1 (for jsonl and txt: the line).
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from raytune_llm.config.paths import expanded
from raytune_llm.data.readers import PLANNERS, READERS, files, hubs
from raytune_llm.data.readers.chunks import MAX_CHUNKS, Chunk, NumberedRow, Source
from raytune_llm.data.readers.splits import Part, of_one_file, of_readme, saved, splits_of
from raytune_llm.errors import DataError

log = logging.getLogger(__name__)

MIN_CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 64 << 20
NUM_CHUNKS = 64
"""The number of chunks to aim at, within the two bounds. Chunks may exceed MAX_CHUNK_BYTES if there would be more than
MAX_CHUNKS."""
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
BESIDE_DATA = re.compile(
    r"(readme|licen[cs]e|notice|changelog|citation|authors|contributing)(\..*)?"
    r"|config\.json|dataset_infos?\.json|dataset_dict\.json|dummy_data\.zip|_success|_metadata|_common_metadata"
    r"|.*\.(md|rst|py|ipynb|sh|yaml|yml|toml|lock|metadata|crc|md5|sha256|png|jpe?g|gif|webp|bmp|mp4|avi|mov|mkv|webm|wav|mp3|flac"
    r"|ogg|m4a)",
    re.IGNORECASE,
)
"""Files in a data folder that have no rows: descriptions, leftovers of tools, and files that rows refer to."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find(
    path: str,
    *,
    subset: str | None = None,
    split: str = "train",
    folder: str | None = None,
    hub: str = "huggingface",
    setting: str = "data.path",
    split_setting: str = "data.split",
) -> Source:
    """The source that data.path names: a file, a folder with files of one type (either may be an address), or a hub data set.

    Of a folder, only the files of the split are used (data/readers/splits.py). setting, split_setting: the names of the settings
    in errors about a missing path and a missing split.
    """
    if not path.strip():
        raise DataError(setting, "names no file or folder", f"For example, {setting}=rows.jsonl.")
    if files.is_address(path):
        place = path if folder is None else f"{path.rstrip('/')}/{folder}"
        found = files.found_at(place, setting)
        above = place.rstrip("/") + "/"
        if found == [place]:
            return _of_file(place, Part.of(split, split_setting), subset)
        there = {file.partition(above)[2] or file: file for file in found}
        return _of_folder(path, there, Part.of(split, split_setting), subset)
    here = expanded(path)
    with files.readable(path):
        is_file, is_dir = here.is_file(), here.is_dir()
        if is_dir and folder is not None and not (here / folder).is_dir():
            raise DataError(str(here / folder), "there is no such folder", f"Correct folder of {setting}.")
    if is_file:
        return _of_file(str(here), Part.of(split, split_setting), subset)
    if is_dir:
        here = here / (folder or ".")
        there = {os.path.relpath(file, here): file for file in files.below(str(here))}
        return _of_folder(path, there, Part.of(split, split_setting), subset)
    if here.suffix.lower() in KIND_OF_SUFFIX or path.startswith(("/", "~", ".")) or not _HUB_ID.fullmatch(path):
        raise _missing(path, here, setting)
    return Source(("hub",), (path,), subset, split, folder, hub)


def _of_file(file: str, part: Part, subset: str | None) -> Source:
    if subset is not None:
        raise _no_subset(file, subset)
    splits = of_one_file(PurePosixPath(file).name)
    if part.split not in splits:
        raise DataError(
            file,
            f"has no split {part.split!r}: a file without a split is {' or '.join(sorted(splits))}",
            f"Leave {part.setting} out.",
        )
    return Source((_kind(file),), (file,))


def _of_folder(path: str, there: Mapping[str, str], part: Part, subset: str | None) -> Source:
    """The Source of a folder. there: file name below the folder -> path."""

    def read(name: str) -> bytes:
        with files.readable(there[name]), files.open_raw(there[name]) as stream:
            return stream.read()

    names = {name: file for name, file in there.items() if not _is_beside_data(name)}
    splits = saved(there, read, path)
    if splits is None and "README.md" in there:
        splits = of_readme(read("README.md").decode(errors="replace"), list(names), subset, path)
    elif subset is not None:
        raise _no_subset(path, subset)
    if splits is None:
        if subset is not None:
            raise _no_subset(path, subset)
        splits = splits_of(list(names))
        if unnamed := names.keys() - set(chain.from_iterable(splits.values())):
            log.warning("%s: these files are in no split, by their names: %s", path, ", ".join(sorted(unnamed)[:5]))
    if not names:
        raise DataError(path, "the folder holds no files with rows", f"Put {_types()} files there.")
    if part.split not in splits:
        raise DataError(path, f"has no split {part.split!r}", f"Set {part.setting} to one of {', '.join(sorted(splits))}.")
    chosen = tuple(there[name] for name in splits[part.split])
    if not chosen:
        raise DataError(path, f"holds no file of the split {part.split!r}", "Fetch the files that its README.md names.")
    kinds = tuple(_kind(file) for file in chosen)
    types = sorted({PurePosixPath(_without_packing(file)).suffix.lower() for file in chosen})
    if len({TYPES.get(kind, kind) for kind in kinds}) > 1:
        raise DataError(path, f"the folder mixes files of several types: {', '.join(types)}", "Name one file, or separate them.")
    return Source(kinds, chosen)


TYPES = {"json": "lines"}
"""Types of files that may be mixed in one folder: .json files may hold lines."""


def _is_beside_data(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part.startswith((".", "__")) for part in parts) or BESIDE_DATA.fullmatch(parts[-1]) is not None


def _no_subset(path: str, subset: str) -> DataError:
    return DataError(path, f"has no subset {subset!r}: subsets need a README.md", "Leave data.subset out.")


def _types() -> str:
    return ", ".join(KIND_OF_SUFFIX)


def _without_packing(file: str) -> str:
    return next((file[: -len(suffix)] for suffix in files.PACKED_SUFFIXES if file.lower().endswith(suffix)), file)


def _kind(file: str) -> str:
    suffix = PurePosixPath(_without_packing(file)).suffix
    kind = KIND_OF_SUFFIX.get(suffix.lower())
    raw = _first_bytes(file, files.open_raw)
    way = next((name for magic, name in files.ARCHIVES.items() if raw.startswith(magic)), None)
    if way is None and kind not in TEXTS:
        way = files.packing(raw) if kind is not None else None
    if way is not None:
        raise DataError(file, f"is compressed ({way})", "Decompress it first.")
    if raw.startswith(b"version https://git-lfs"):
        raise DataError(file, "is a Git LFS pointer, not the file itself", "Fetch it with `git lfs pull`.")
    if raw.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(file, "is a web page", "Fetch the file itself (on a hub under /resolve/; /blob/ is its page).")
    if kind is None:
        raise DataError(file, f"has a type that is not read ({suffix or 'no suffix'}); there are {_types()}", "Convert it.")
    start = _first_bytes(file, files.open_file) if files.packing(raw) else raw
    if kind in TEXTS and start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise DataError(file, "is UTF-16", "Save it as UTF-8.")
    if kind in TEXTS and b"\0" in start:
        raise DataError(file, "is not text: it holds zero bytes", "Save it as UTF-8.")
    text = start.removeprefix(BOM_UTF8).lstrip()
    first = text[:1]
    if kind in ("json", "lines") and text.partition(b"\n")[0].strip() == b"{":
        raise DataError(file, "holds an object over several lines", "Save the rows as a JSON array, or as one object a line.")
    # .json and .jsonl are often confused: the content decides between an array and one object per line.
    return "lines" if kind == "json" and first == b"{" else "json" if kind == "lines" and first == b"[" else kind


def _first_bytes(file: str, opened: Callable[[str], BinaryIO]) -> bytes:
    if not files.is_address(file) and not os.path.isfile(file):
        broken = os.path.islink(file)
        raise DataError(file, "is a broken link" if broken else "is no file that can be read", "Fetch it, or remove it.")
    with files.readable(file), opened(file) as stream:
        return stream.read(4096)


def _missing(path: str, here: Path, setting: str) -> DataError:
    if here.is_symlink():
        return DataError(path, "is a broken link", "Fetch what it leads to, or name another file.")
    if here.exists():
        return DataError(path, "is neither a file nor a folder", "Save the rows in a file.")
    folder = here.parent
    with files.readable(path):
        while not folder.is_dir():
            folder = folder.parent
        near = difflib.get_close_matches(here.name, os.listdir(folder), n=1)
    where = "" if not setting.startswith("data.") else "; it is taken from the folder that the command runs in"
    return DataError(
        path, "there is no such file or folder", f"Did you mean {folder / near[0]}?" if near else f"Check {setting}{where}."
    )


def fingerprint(source: Source) -> str:
    """A hash of the content: of the files' bytes in order, independent of their names, or of a hub data set's revision."""
    digest = hashlib.sha256(" ".join(sorted(set(source.kinds))).encode())
    if source.is_hub:
        digest.update(f"{source.files[0]} {source.subset} {source.split} {hubs.fingerprint(source)}".encode())
        return digest.hexdigest()
    for file in source.files:
        with files.readable(file):
            digest.update(files.contents_hash(file))
    return digest.hexdigest()


def plan(
    source: Source,
    max_rows: int | None = None,
    *,
    part: str | None = None,
    num_samples: int | None = None,
    split_setting: str = "data.split",
) -> list[Chunk]:
    """The chunks of a source in order, each with the rows to use.

    max_rows: use only the first rows. part: a split or a slice of one (splits.Part). num_samples: draw this many rows; the draw
    depends only on the number of rows.
    """
    rows = Part("train") if part is None else Part.of(part, split_setting)
    whole = rows.is_whole and num_samples is None
    chunks = _plan_whole(source, max_rows if whole else None)
    if whole:
        return chunks
    num_rows = sum(chunk.num_rows for chunk in chunks)
    meant = rows.rows(num_rows)
    chosen = np.arange(meant.start, meant.stop)
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
        raise DataError(", ".join(source.files[:3]), f"holds no rows in {part}: there are {num_rows}", f"Correct {rows.setting}.")
    return picked


def _plan_whole(source: Source, max_rows: int | None) -> list[Chunk]:
    total_bytes = 0 if source.is_hub else sum(_size(file) for file in source.files)
    chunk_bytes = chunk_bytes_of(total_bytes)
    chunks: list[Chunk] = []
    left = max_rows
    for kind, file in zip(source.kinds, source.files, strict=True):
        for chunk in _planned(kind, source, file, chunk_bytes):
            chunks.append(chunk if left is None else replace(chunk, num_rows=min(chunk.num_rows, left)))
            if left is not None:
                left -= chunks[-1].num_rows
                if left == 0:
                    return chunks
    if not chunks:
        raise DataError(", ".join(source.files[:3]), "holds no rows", "Give data.path a file with at least one row.")
    return chunks


def chunk_bytes_of(total_bytes: int) -> int:
    """The size of a chunk, for data of this many bytes in all."""
    return max(min(max(total_bytes // NUM_CHUNKS, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES), total_bytes // MAX_CHUNKS)


def _planned(kind: str, source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    with files.readable(file):
        yield from PLANNERS[kind](replace(source, kinds=(kind,), files=(file,)), file, chunk_bytes)


def _size(file: str) -> int:
    with files.readable(file):
        packed = file.lower().endswith(files.PACKED_SUFFIXES)
        return files.size(file) * (files.UNPACKED_TIMES if packed else 1)


def read(chunk: Chunk, columns: Collection[str] | None = None) -> Iterator[NumberedRow]:
    """The rows of a chunk with their numbers. columns: read only these columns of a table, and leave the others null; None:
    all."""
    with files.readable(chunk.file):
        rows = READERS[chunk.kind](chunk, columns)
        numbered = enumerate(row for _, row in zip(range(chunk.num_rows), rows, strict=False))
        if chunk.picks is None:
            yield from (row for _, row in numbered)
            return
        times = Counter(chunk.picks)
        for offset, row in numbered:
            yield from repeat(row, times[offset])


def where(chunk: Chunk, row: int) -> str:
    return f"{chunk.file}, row {row}"

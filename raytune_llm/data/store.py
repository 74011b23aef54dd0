"""The token store: tokenized rows on disk, memory-mapped.

`<cache>/<key>/` has shard-00000.arrow, ... (Arrow IPC files of one record batch) and manifest.json, which names the kind of the
rows and so their columns (data/kinds/). The key is a hash of everything that determines the tokens (`key_of`).

Several stores of one kind can form a joined store: a folder with a manifest that lists them, and no shards of its own.

A store under construction is named `.<key>.partial`. Its shards are written in any order, each to a temporary file that is
renamed, and outline.json has their number, so that data/streaming.py can read them as they appear. Until the manifest lists them,
each has its hash and number of rows in a file beside it. The folder is renamed at the end, so a store is complete or absent.

The statistics of a shard are in the metadata of its Arrow schema, so that a later run can reuse the finished shards of a crashed
one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from raytune_llm.atomic_file import write_atomically
from raytune_llm.byte_size import in_units
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.kind import Column, Kind, MappedShard, Rows, joined
from raytune_llm.disk import DISK_FULL, free_bytes
from raytune_llm.errors import ConfigError, DataError, ResourceError, first_line
from raytune_llm.file_hash import sha256_of

FORMAT_VERSION = 4
"""Increase it when the format of a shard or a manifest changes."""
MANIFEST = "manifest.json"
ENTRIES = {"kind", "end_of_row", "made_from", "rows", "tokens", "trained_tokens", "dropped", "shortened", "shards"}
"""What each manifest has, beside its version."""
OUTLINE = "outline.json"
"""In a store under construction: the number of its shards, their kind and end_of_row."""
FAILED = "failed.txt"
"""In a store whose construction failed: the error."""
_STATS = b"raytune_llm.stats"
HASHED_AT_ONCE = 8
"""Files that are hashed in parallel, so that the disk limits the speed and not one core."""
LOOK_EVERY_S = 0.1
SAID_AFTER_S, SAID_AGAIN_S = 3.0, 60.0
"""Of a lock that another process holds, and of shards that are compared."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardStats:
    """Statistics of a shard, which are known without reading its rows."""

    rows: int
    tokens: int
    trained_tokens: int
    dropped: Dropped = field(default_factory=Dropped)
    shortened: Dropped = field(default_factory=Dropped)
    """Rows in the shard that were shortened to data.max_length."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dropped": self.dropped.to_json(), "shortened": self.shortened.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShardStats:
        counted = {name: Dropped.from_json(values[name]) for name in ("dropped", "shortened")}
        return cls(**{**values, **counted})


@dataclass(frozen=True)
class Shard:
    """A finished shard, as listed in the manifest."""

    name: str
    bytes: int
    sha256: str
    stats: ShardStats


def key_of(made_from: Mapping[str, Any]) -> str:
    """The name of a store: a hash of everything that determines its tokens."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


def write_shard(
    path: Path, rows: Sequence[Any], dropped: Dropped, *, kind: Kind, shortened: Dropped | None = None, source: int = 0
) -> Shard:
    """Write rows to a temporary file and rename it. The same rows always give the same bytes.

    Raises ResourceError if the disk is full.
    """
    columns = {name: _arrow([getattr(row, name) for row in rows], column) for name, column in kind.columns.items()}
    written = {name: _as_numpy(column) for name, column in columns.items()}
    stats = ShardStats(
        rows=len(rows),
        tokens=int(kind.lengths(written).sum()),
        trained_tokens=int(kind.trained(written).sum()),
        dropped=dropped,
        shortened=shortened or Dropped(),
    )
    columns["source"] = pa.array(np.full(len(rows), source, np.int16))
    batch = pa.record_batch(columns)
    schema = batch.schema.with_metadata({_STATS: json.dumps(stats.to_json(), sort_keys=True).encode()})
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _full_disk_explained(path.parent):
            with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            shard = Shard(path.name, beside.stat().st_size, sha256_of(beside), stats)
            record(path, shard)
            beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    return shard


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = in_units(free_bytes(folder))
        raise ResourceError(
            f"the token store can't be written to {folder}: {error.strerror} ({free} are free)",
            "Free some space, or set data.cache on a larger disk; repeating the command resumes from the finished shards.",
        ) from error


def finished_shard(path: Path) -> Shard | None:
    """A shard that an earlier run finished. None: there is none, or it is damaged."""
    try:
        sha256 = sha256_of(path)
        return shard_at(path, sha256) if sha256 == recorded(path)[0] else None
    except FileNotFoundError:
        return None


def shard_at(path: Path, sha256: str) -> Shard:
    """The shard in an undamaged file of this hash."""
    with pa.memory_map(str(path)) as source:
        metadata = pa.ipc.open_file(source).schema.metadata
    return Shard(path.name, path.stat().st_size, sha256, ShardStats.from_json(json.loads(metadata[_STATS])))


def record(path: Path, shard: Shard) -> None:
    """Keep the hash and the number of rows of a shard of a store under construction. Called before the shard appears."""
    _record_of(path).write_text(f"{shard.sha256} {shard.stats.rows}")


def recorded(path: Path) -> tuple[str, int]:
    """The hash and the number of rows that `record` kept of a shard. Raises FileNotFoundError if it is not made yet."""
    found = re.fullmatch(rb"([0-9a-f]{64}) (\d+)", _record_of(path).read_bytes())
    if found is None:  # half of it is written
        raise FileNotFoundError(path)
    return found[1].decode(), int(found[2])


def _record_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.made")


@contextmanager
def locked(cache: Path, key: str) -> Iterator[None]:
    """Holds the lock of a key inside the block. Waits without limit for who holds it, and says so. The kernel releases it when
    the process ends, so a crash leaves none."""
    with _open_lock(cache, key) as lock:
        _take(lock, str(cache / key))
        yield


def _take(lock: IO[str], what: str) -> None:
    """Says who holds it, where that lasts."""
    began, said_at = time.monotonic(), SAID_AFTER_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pass
        if (waited := time.monotonic() - began) > said_at:
            lock.seek(0)
            log.warning("waiting for %s, which %s makes (%.0f s)", what, lock.read() or "another process", waited)
            said_at = max(2 * said_at, SAID_AGAIN_S)
        time.sleep(LOOK_EVERY_S)
    with suppress(OSError):  # a full disk
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())


def _open_lock(cache: Path, key: str) -> IO[str]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return open(cache / f".{key}.lock", "a+")
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk has its own error
        rule = f"must be a folder that can be written ({getattr(error, 'strerror', None) or error})"
        raise ConfigError("data.cache", rule, got=str(cache), fix="Choose another one.") from None


@contextmanager
def under_construction(cache: Path, key: str) -> Iterator[Path | None]:
    """The folder to build the store `key` in, or None if it is complete. Waits while another run builds it.

    A complete one may be another user's, in a cache that this one can't write to.
    """
    if _is_complete(cache / key):
        yield None
        return
    with _full_disk_explained(cache), locked(cache, key):
        if _is_complete(cache / key):
            yield None
            return
        shutil.rmtree(cache / key, ignore_errors=True)  # a folder without a manifest is not a store
        folder = partial(cache / key)
        folder.mkdir(exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        try:
            yield folder
        except InterruptedError:
            raise  # another run can continue it
        except Exception as error:
            with suppress(OSError):
                write_atomically(folder / FAILED, str(error))
            raise


def _is_complete(store: Path) -> bool:
    try:
        return (store / MANIFEST).exists()
    except (OSError, ValueError):
        return False  # not a valid path, or no permission: taking the lock reports it


def partial(target: Path) -> Path:
    """The folder of a store under construction."""
    return target.with_name(f".{target.name}.partial")


def write_outline(folder: Path, num_shards: int, kind: str, end_of_row: int | None) -> None:
    write_atomically(folder / OUTLINE, json.dumps({"num_shards": num_shards, "kind": kind, "end_of_row": end_of_row}))


def complete(
    folder: Path,
    shards: Sequence[Shard],
    made_from: Mapping[str, Any],
    target: Path,
    *,
    kind: str,
    end_of_row: int | None = None,
) -> None:
    """Write the manifest and rename the folder. kind: a name in KINDS."""
    dropped, shortened = Dropped(), Dropped()
    for shard in shards:
        dropped.merge(shard.stats.dropped)
        shortened.merge(shard.stats.shortened)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "end_of_row": end_of_row,
        "made_from": made_from,
        "rows": sum(shard.stats.rows for shard in shards),
        "tokens": sum(shard.stats.tokens for shard in shards),
        "trained_tokens": sum(shard.stats.trained_tokens for shard in shards),
        "dropped": dropped.to_json(),
        "shortened": shortened.to_json(),
        "shards": [
            {"name": shard.name, "rows": shard.stats.rows, "bytes": shard.bytes, "sha256": shard.sha256} for shard in shards
        ],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
    folder.rename(target)
    listed = {MANIFEST, *(shard.name for shard in shards)}
    for file in target.iterdir():  # not before: after a crash, shards without records would be made again
        if file.name not in listed:
            file.unlink()  # the shards' records, and what a writer that was killed left


def join(cache: Path, members: Sequence[tuple[str, Store]]) -> Store:
    """The joined store of (source name, store) members: their rows, one member after another."""
    stores = [store for _, store in members]
    made_from = {"joined": [[name, store.folder.name] for name, store in members]}
    target = cache / key_of(made_from)
    with under_construction(cache, target.name) as folder:
        if folder is not None:
            dropped, shortened = Dropped(), Dropped()
            for store in stores:
                dropped.merge(store.dropped)
                shortened.merge(store.shortened)
            manifest = {
                "format_version": FORMAT_VERSION,
                "kind": stores[0].manifest["kind"],
                "end_of_row": stores[0].end_of_row,
                "made_from": made_from,
                "rows": sum(store.num_rows for store in stores),
                "tokens": sum(store.num_tokens for store in stores),
                "trained_tokens": sum(store.num_trained_tokens for store in stores),
                "dropped": dropped.to_json(),
                "shortened": shortened.to_json(),
                "members": [{"source": name, "store": store.folder.name} for name, store in members],
                "shards": [],
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
            folder.rename(target)
    return Store.open(target)


class Store(Rows):
    """A complete store, memory-mapped. Rows are numbered from 0 over all shards."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], place: str | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.place = place or str(folder)
        """Where all machines find it: the folder, or its address in an object store."""
        self.num_tokens: int = manifest["tokens"]
        self.num_trained_tokens: int = manifest["trained_tokens"]
        self.dropped, self.shortened = (Dropped.from_json(manifest[name]) for name in ("dropped", "shortened"))
        self.members = [Store.open(folder.parent / member["store"]) for member in manifest.get("members", ())]
        self.sources = tuple(member["source"] for member in manifest.get("members", ()))
        """Source names of a joined store's members; empty for others."""
        for shard in manifest["shards"]:
            check_listed(folder / shard["name"], shard)
        shards = [map_shard(folder / shard["name"]) for shard in manifest["shards"]]
        shards += [shard for member in self.members for shard in member.shards]
        self.identity = self.manifest_hash
        super().__init__(KINDS[manifest["kind"]], manifest["end_of_row"], shards)

    @classmethod
    def open(cls, folder: str | Path, place: str | None = None) -> Store:
        """The store in a folder. place: where all machines find it, if that is not the folder (data/shared_stores.py).

        Raises DataError if the folder has no store, or one that is damaged or of another version.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder), place)

    @cached_property
    def row_sources(self) -> np.ndarray:
        """int16 [rows]: index of the member that each row of a joined store is from; 0 for other stores."""
        return np.repeat(np.arange(max(len(self.members), 1), dtype=np.int16), [len(one) for one in self.members] or [len(self)])

    @cached_property
    def manifest_hash(self) -> str:
        """A hash of the store's inputs and shards, equal on every machine."""
        content = {"made_from": self.manifest["made_from"], "shards": self.manifest["shards"]}
        if self.members:
            content["members"] = [member.manifest_hash for member in self.members]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Read all shards in full, with those of its members, and compare their hashes. Raises DataError for a difference."""
        for member in self.members:
            member.verify()
        compare_shards(self.folder, {shard["name"]: shard["sha256"] for shard in self.manifest["shards"]})


def compare_shards(folder: Path, hashes: Mapping[str, str]) -> None:
    """Read shards in full, which is said where it lasts. hashes: by name. Raises DataError for a difference."""
    began, said_at = time.monotonic(), SAID_AFTER_S
    with ThreadPoolExecutor(HASHED_AT_ONCE, thread_name_prefix="hash") as pool:
        compared = pool.map(lambda name: sha256_of(folder / name), hashes)
        for number, (name, found) in enumerate(zip(hashes, compared, strict=True), start=1):
            if found != hashes[name]:
                raise corrupt(folder / name, "does not match its hash in the manifest")
            if (took := time.monotonic() - began) > said_at:
                log.warning("%d of %d shards in %s are compared with their hashes (%.0f s)", number, len(hashes), folder, took)
                said_at = max(2 * said_at, SAID_AGAIN_S)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the store in a folder. Raises DataError if there is none, or one that is damaged or of another version."""
    try:
        manifest = manifest_in((folder / MANIFEST).read_bytes(), str(folder))
    except FileNotFoundError:
        raise DataError(str(folder), "is not a token store (it has no manifest)", "Create it with the verb prepare.") from None
    except IsADirectoryError:
        raise corrupt(folder / MANIFEST, "is a folder") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            str(folder),
            f"is a token store of version {manifest.get('format_version')}, this program reads version {FORMAT_VERSION}",
            "Delete the folder and run prepare again.",
        )
    if manifest["kind"] not in KINDS:
        raise corrupt(folder / MANIFEST, f"has rows of the unknown kind {manifest['kind']!r}")
    return manifest


def manifest_in(content: bytes, place: str) -> dict[str, Any]:
    """The manifest of the store at a place. Raises DataError if the file is damaged."""
    try:
        manifest = json.loads(content)
        if manifest["format_version"] != FORMAT_VERSION or not ENTRIES - manifest.keys():
            return manifest
        problem = f"lacks {', '.join(sorted(ENTRIES - manifest.keys()))}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = "is not readable"
    raise DataError(f"{place}/{MANIFEST}", problem, f"Delete {place} and run prepare again.")


def check_listed(path: Path, listed: Mapping[str, Any]) -> None:
    """Raises DataError if a shard of the manifest is missing, or has another size."""
    if not path.exists():
        raise corrupt(path, "is missing")
    if path.stat().st_size != listed["bytes"]:
        raise corrupt(path, f"has {path.stat().st_size} bytes, but {listed['bytes']} in the manifest")


def map_shard(path: Path) -> MappedShard:
    """The columns of a shard, memory-mapped. Raises FileNotFoundError, DataError if the file is seen to be damaged, and
    ResourceError if the process has reached its limit of memory maps.

    Compare it with its hash first, as Arrow reads what it should not where a file's description of itself is damaged.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        return {name: _as_numpy(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except (ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        raise corrupt(path, f"is not readable ({first_line(error)})") from None
    except OSError as error:
        if error.errno is None:  # Arrow's own, of the content
            raise corrupt(path, f"is not readable ({first_line(error)})") from None
        if error.errno != errno.ENOMEM:
            raise
        raise ResourceError(
            f"{path} can't be mapped into memory ({error.strerror}): a process has a map for each shard of a store",
            "Allow more (sysctl -w vm.max_map_count=1048576), or join the data's files: each has at least one shard.",
        ) from error


def corrupt(path: Path, problem: str) -> DataError:
    return DataError(str(path), problem, f"Delete the folder {path.parent} and run prepare again.")


def _as_numpy(column: Any) -> Any:
    """(offsets, values) of a column of lists, else the values of the column. They are views, except for booleans."""
    return (_values(column.offsets), _values(column.values)) if pa.types.is_list(column.type) else _values(column)


def _values(array: Any) -> np.ndarray:
    """The values of an array without nulls. pyarrow's own `to_numpy` would import pandas if it is installed, which takes more
    than a second."""
    first, last = array.offset, array.offset + len(array)
    buffer = array.buffers()[1] or b""
    if pa.types.is_boolean(array.type):
        return np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")[first:last].astype(bool)
    return np.frombuffer(buffer, array.type.to_pandas_dtype())[first:last]


def _arrow(values: Sequence[Any], column: Column) -> Any:
    if not column.is_list:
        return pa.array(np.array(values, column.dtype))
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(joined(values, column.dtype)))

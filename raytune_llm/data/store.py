"""The token store: token rows on disk, memory-mapped.

`<cache>/<key>/` holds shard-00000.arrow, ... (Arrow IPC files of one record batch: ids, spans, source) and manifest.json.
While it is being made its name is `.<key>.partial`; the rename at the end is the only way in which a store comes to be, so
it is whole or absent. The key is a hash of everything that determines the tokens; see `key_of`.

The statistics of a shard travel in its Arrow schema's metadata, so that finished shards of a crashed run can be taken over.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_llm.data.dropped import Dropped
from raytune_llm.errors import DataError
from raytune_llm.records import TokenRow

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("spans", pa.list_(pa.int32())), ("source", pa.int16())])
_STATS = b"raytune_llm.stats"


@dataclass(frozen=True)
class ShardStats:
    """What is known of a shard without reading its rows."""

    rows: int
    tokens: int
    trained_tokens: int
    dropped: Dropped = field(default_factory=Dropped)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dropped": self.dropped.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShardStats:
        return cls(**{**values, "dropped": Dropped.from_json(values["dropped"])})


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest lists it."""

    name: str
    bytes: int
    sha256: str
    stats: ShardStats


def key_of(made_from: Mapping[str, Any]) -> str:
    """The name of the store that these inputs make."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


def write_shard(path: Path, rows: Sequence[TokenRow], dropped: Dropped, *, source: int = 0) -> Shard:
    """Write beside, then rename. The same rows always give the same bytes."""
    ids, spans = _lists([row.ids for row in rows]), _lists([row.spans for row in rows])
    stats = ShardStats(
        rows=len(rows),
        tokens=len(ids.values),
        trained_tokens=int(targets(*_offsets_and_values(spans)).sum()),
        dropped=dropped,
    )
    schema = SCHEMA.with_metadata({_STATS: json.dumps(stats.to_json(), sort_keys=True).encode()})
    sources = pa.array(np.full(len(rows), source, np.int16))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch([ids, spans, sources], schema=schema))
        shard = Shard(path.name, beside.stat().st_size, _sha256(beside), stats)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    return shard


def finished_shard(path: Path) -> Shard | None:
    """The shard that an earlier run left there, if it did."""
    if not path.exists():
        return None
    try:
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata
    except pa.ArrowInvalid:
        return None
    if metadata is None or _STATS not in metadata:
        return None
    return Shard(path.name, path.stat().st_size, _sha256(path), ShardStats.from_json(json.loads(metadata[_STATS])))


def targets(span_offsets: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Trained positions of each row that have a predecessor to be predicted from."""
    starts, ends = spans[0::2], spans[1::2]
    passed = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(ends - np.maximum(starts, 1), out=passed[1:])
    return passed[span_offsets[1:] // 2] - passed[span_offsets[:-1] // 2]


@contextmanager
def under_construction(cache: Path, key: str) -> Iterator[Path | None]:
    """The folder in which to make the store `key`, or None where it is complete; other runs that want it wait here.

    The lock is the kernel's and goes with the process, so a crash leaves none behind.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (cache / key / MANIFEST).exists():
            yield None
            return
        shutil.rmtree(cache / key, ignore_errors=True)  # a folder without a manifest is no store
        folder = cache / f".{key}.partial"
        folder.mkdir(exist_ok=True)
        yield folder


def complete(folder: Path, shards: Sequence[Shard], made_from: Mapping[str, Any], target: Path) -> None:
    """Write the manifest and give the folder its name."""
    dropped = Dropped()
    for shard in shards:
        dropped.merge(shard.stats.dropped)
    listed = {shard.name for shard in shards}
    for file in folder.iterdir():
        if file.name not in listed:
            file.unlink()  # left by a writer that was killed
    manifest = {
        "format_version": FORMAT_VERSION,
        "made_from": made_from,
        "rows": sum(shard.stats.rows for shard in shards),
        "tokens": sum(shard.stats.tokens for shard in shards),
        "trained_tokens": sum(shard.stats.trained_tokens for shard in shards),
        "dropped": dropped.to_json(),
        "shards": [
            {"name": shard.name, "rows": shard.stats.rows, "bytes": shard.bytes, "sha256": shard.sha256} for shard in shards
        ],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
    folder.rename(target)


class Store:
    """A complete store, memory-mapped. Rows are numbered through all shards."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.num_rows: int = manifest["rows"]
        self.num_tokens: int = manifest["tokens"]
        self.num_trained_tokens: int = manifest["trained_tokens"]
        self.dropped = Dropped.from_json(manifest["dropped"])
        self._shards = [_map_shard(folder / shard["name"], shard) for shard in manifest["shards"]]
        self._first_rows = np.cumsum([0, *(shard["rows"] for shard in manifest["shards"])]).tolist()

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise DataError(str(folder), "is no token store (it has no manifest)", "Make it with the verb prepare.") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise _corrupt(folder / MANIFEST, "is not readable") from None
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                str(folder),
                f"is a token store of version {manifest.get('format_version')}, this program reads version {FORMAT_VERSION}",
                "Delete the folder and run prepare again.",
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.num_rows

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and flattened spans, as int32 views of the file."""
        shard = bisect_right(self._first_rows, number) - 1
        local = number - self._first_rows[shard]
        id_offsets, ids, span_offsets, spans = self._shards[shard]
        return ids[id_offsets[local] : id_offsets[local + 1]], spans[span_offsets[local] : span_offsets[local + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32: tokens of each row."""
        return _joined([np.diff(id_offsets) for id_offsets, _, _, _ in self._shards], np.int32)

    @cached_property
    def targets(self) -> np.ndarray:
        """int32: trained tokens of each row that have a predecessor."""
        return _joined([targets(span_offsets, spans) for _, _, span_offsets, spans in self._shards], np.int32)

    @cached_property
    def manifest_hash(self) -> str:
        """Of what was put in and what came out; the same on every machine."""
        content = {"made_from": self.manifest["made_from"], "shards": self.manifest["shards"]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Read every shard whole and compare its hash."""
        for shard in self.manifest["shards"]:
            if _sha256(self.folder / shard["name"]) != shard["sha256"]:
                raise _corrupt(self.folder / shard["name"], "does not have the contents that the manifest says")


def _map_shard(path: Path, listed: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Offsets and flat values of ids and of spans, as views of the file."""
    if not path.exists():
        raise _corrupt(path, "is missing")
    if path.stat().st_size != listed["bytes"]:
        raise _corrupt(path, f"has {path.stat().st_size} bytes, not the {listed['bytes']} that the manifest says")
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except pa.ArrowInvalid as error:
        raise _corrupt(path, f"is not readable ({error})") from None
    return *_offsets_and_values(batch.column(0)), *_offsets_and_values(batch.column(1))


def _corrupt(path: Path, problem: str) -> DataError:
    return DataError(str(path), problem, f"Delete the folder {path.parent} and run prepare again.")


def _offsets_and_values(lists: Any) -> tuple[np.ndarray, np.ndarray]:
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _lists(rows: Sequence[Any]) -> Any:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(_joined(rows, np.int32)))


def _joined(arrays: Sequence[Any], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if len(arrays) else np.zeros(0, dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

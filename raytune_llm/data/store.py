"""The token store: token rows on disk, memory-mapped.

`<cache>/<key>/` holds shard-00000.arrow, ... (Arrow IPC files of one record batch) and manifest.json, which says the kind of
its rows:

    conversations         ids, spans, weights: TokenRow
    text                  ids, spans: TokenRow
    pairs                 prompt_ids, chosen_ids, rejected_ids, margin: PairRow
    labeled               prompt_ids, answer_ids, desirable: LabeledRow
    prompts               prompt_ids, answer_ids: PromptRow

Several stores of one kind make a joined store: a folder with a manifest that lists them, and no shards of its own.

While it is being made its name is `.<key>.partial`. Its shards come one by one, in any order, each whole by its rename, and
outline.json says how many there will be: data/streaming.py reads them as they come. The rename of the folder at the end is the
only way in which a store comes to be, so it is whole or absent. The key is a hash of everything that determines the tokens; see
`key_of`.

The statistics of a shard travel in its Arrow schema's metadata, so that finished shards of a crashed run can be taken over.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_llm.data.dropped import Dropped
from raytune_llm.errors import DataError, ResourceError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
OUTLINE = "outline.json"
"""In a store that is being made: the number of its shards, their kind and end_of_row."""
FAILED = "failed.txt"
"""In a store that is not being made any more: why."""
LISTS = {
    "conversations": ("ids", "spans"),
    "text": ("ids", "spans"),
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "labeled": ("prompt_ids", "answer_ids"),
    "prompts": ("prompt_ids", "answer_ids"),
}
"""Columns of int32 lists of each kind of rows."""
NUMBERS = {"pairs": ("margin", np.float32), "labeled": ("desirable", np.bool_)}
"""The column of one number a row, where a kind has one."""
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


def write_shard(path: Path, rows: Sequence[Any], dropped: Dropped, *, kind: str = "conversations", source: int = 0) -> Shard:
    """Write beside, then rename. The same rows always give the same bytes."""
    columns = {name: _lists([getattr(row, name) for row in rows]) for name in LISTS[kind]}
    lists = {name: _offsets_and_values(column) for name, column in columns.items()}
    stats = ShardStats(
        rows=len(rows), tokens=int(_lengths(lists).sum()), trained_tokens=int(_targets(lists).sum()), dropped=dropped
    )
    if kind in NUMBERS:
        name, dtype = NUMBERS[kind]
        columns[name] = pa.array(np.array([getattr(row, name) for row in rows], dtype))
    if kind == "conversations":
        columns["weights"] = _lists([row.weights for row in rows], np.float32)
    columns["source"] = pa.array(np.full(len(rows), source, np.int16))
    batch = pa.record_batch(columns)
    schema = batch.schema.with_metadata({_STATS: json.dumps(stats.to_json(), sort_keys=True).encode()})
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        shard = Shard(path.name, beside.stat().st_size, _sha256(beside), stats)
        beside.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free / 2**30
        raise ResourceError(
            f"the token store can't be written to {path.parent}: {error.strerror} ({free:.1f} GiB are free)",
            "Free some space, or set data.cache on a larger disk; repeating the command goes on from the finished shards.",
        ) from error
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


def targets(span_offsets: np.ndarray, spans: np.ndarray, weights: np.ndarray | int = 1) -> np.ndarray:
    """Trained positions of each row that have a predecessor to be predicted from, by the weights of their spans."""
    starts, ends = spans[0::2], spans[1::2]
    counts = (ends - np.maximum(starts, 1)).astype(np.int64) * weights
    passed = np.concatenate([np.zeros(1, counts.dtype), np.cumsum(counts)])
    return passed[span_offsets[1:] // 2] - passed[span_offsets[:-1] // 2]


MappedShard = Mapping[str, Any]
"""Offsets and flat values of each column of lists, and the values of any other, as views of the file."""
Lists = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Offsets and flat values of each column of lists."""


def _lengths(lists: Lists) -> np.ndarray:
    """Tokens of each row; of a pair, those of both sides, each with the request."""
    sizes = {name: np.diff(offsets) for name, (offsets, _) in lists.items()}
    if "ids" in sizes:
        return sizes["ids"]
    return sum(sizes.values()) + (sizes["prompt_ids"] if "rejected_ids" in sizes else 0)  # type: ignore[return-value]


def _targets(lists: Lists) -> np.ndarray:
    """Trained tokens of each row."""
    if "spans" in lists:
        return targets(*lists["spans"])
    return sum(np.diff(offsets) for name, (offsets, _) in lists.items() if name != "prompt_ids")  # type: ignore[return-value]


def _weighted_targets(shard: MappedShard) -> np.ndarray:
    """Of each conversation: its trained tokens, by their weights. int64 where all weigh 1, else float64."""
    (offsets, weights), (span_offsets, spans) = shard["weights"], shard["spans"]
    if not len(weights):
        return targets(span_offsets, spans)
    of_spans = np.ones(len(spans) // 2)
    of_spans[np.repeat(np.diff(offsets) > 0, np.diff(span_offsets) // 2)] = weights
    return targets(span_offsets, spans, of_spans)


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
        folder = partial(cache / key)
        folder.mkdir(exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        try:
            yield folder
        except InterruptedError:
            raise  # another run may go on with it
        except Exception as error:
            with suppress(OSError):
                write_whole(folder / FAILED, str(error))
            raise


def partial(target: Path) -> Path:
    """The folder in which the store is made."""
    return target.with_name(f".{target.name}.partial")


def write_outline(folder: Path, num_shards: int, kind: str, end_of_row: int | None) -> None:
    write_whole(folder / OUTLINE, json.dumps({"num_shards": num_shards, "kind": kind, "end_of_row": end_of_row}))


def write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.rename(path)


def complete(
    folder: Path,
    shards: Sequence[Shard],
    made_from: Mapping[str, Any],
    target: Path,
    *,
    kind: str = "conversations",
    end_of_row: int | None = None,
) -> None:
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
        "kind": kind,
        "end_of_row": end_of_row,
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


def join(cache: Path, members: Sequence[tuple[str, Store]]) -> Store:
    """The store of the rows of these stores, one after another, with the names of their sources."""
    stores = [store for _, store in members]
    made_from = {"joined": [[name, store.folder.name] for name, store in members]}
    target = cache / key_of(made_from)
    with under_construction(cache, target.name) as folder:
        if folder is not None:
            dropped = Dropped()
            for store in stores:
                dropped.merge(store.dropped)
            manifest = {
                "format_version": FORMAT_VERSION,
                "kind": stores[0].kind,
                "end_of_row": stores[0].end_of_row,
                "made_from": made_from,
                "rows": sum(store.num_rows for store in stores),
                "tokens": sum(store.num_tokens for store in stores),
                "trained_tokens": sum(store.num_trained_tokens for store in stores),
                "dropped": dropped.to_json(),
                "members": [{"source": name, "store": store.folder.name} for name, store in members],
                "shards": [],
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
            folder.rename(target)
    return Store.open(target)


class Rows:
    """Rows of mapped shards of one kind, numbered through them."""

    def __init__(self, kind: str, end_of_row: int | None, shards: Sequence[MappedShard]) -> None:
        self.kind = kind
        self.end_of_row = end_of_row
        """The id that is the target at the end of every span, where the template writes no end of its own."""
        self.shards = list(shards)
        self._first_rows = np.cumsum([0, *(num_rows(shard) for shard in self.shards)]).tolist()
        self.num_rows: int = self._first_rows[-1]

    def only(self, rows: np.ndarray) -> tuple[Rows, np.ndarray]:
        """The shards that these rows are in, and the rows' numbers among them."""
        first_rows = np.array(self._first_rows)
        shard_of = np.searchsorted(first_rows, rows, side="right") - 1
        used = np.unique(shard_of)
        part = Rows(self.kind, self.end_of_row, [self.shards[shard] for shard in used.tolist()])
        moved = np.zeros(len(first_rows), np.int64)
        moved[used] = np.array(part._first_rows[:-1]) - first_rows[used]
        return part, rows + moved[shard_of]

    def __len__(self) -> int:
        return self.num_rows

    def row(self, number: int) -> Any:
        """The row's lists as a tuple, in the order of LISTS (ids and flattened spans, say), as int32 views of the file."""
        shard = bisect_right(self._first_rows, number) - 1
        local = number - self._first_rows[shard]
        columns = self.shards[shard]
        return tuple(
            values[offsets[local] : offsets[local + 1]] for offsets, values in (columns[name] for name in LISTS[self.kind])
        )

    def weights(self, number: int) -> np.ndarray:
        """float32: of each span of a conversation in the loss; empty where all weigh 1."""
        shard = bisect_right(self._first_rows, number) - 1
        local = number - self._first_rows[shard]
        offsets, values = self.shards[shard]["weights"]
        return values[offsets[local] : offsets[local + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32: tokens of each row; of a pair, those of both sides, each with the request."""
        return _joined([_lengths(self._lists(shard)) for shard in self.shards], np.int32)

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """int64: tokens of each row's request, where rows have one."""
        return _joined([np.diff(shard["prompt_ids"][0]) for shard in self.shards], np.int64)

    @cached_property
    def targets(self) -> np.ndarray:
        """int32: trained tokens of each row that have a predecessor."""
        return _joined([_targets(self._lists(shard)) for shard in self.shards], np.int32)

    @cached_property
    def weighted_targets(self) -> np.ndarray:
        """Of each conversation: its trained tokens, by their weights. int64 where all weigh 1, else float64."""
        return np.concatenate([np.zeros(0, np.int64), *map(_weighted_targets, self.shards)])

    @cached_property
    def desirable(self) -> np.ndarray:
        """bool: the verdicts of labelled rows."""
        return _joined([shard["desirable"] for shard in self.shards], bool)

    @cached_property
    def margins(self) -> np.ndarray:
        """float32: by how much the first answer of each pair is preferred."""
        return _joined([shard["margin"] for shard in self.shards], np.float32)

    def _lists(self, shard: Mapping[str, Any]) -> Lists:
        return {name: shard[name] for name in LISTS[self.kind]}


class Store(Rows):
    """A complete store, memory-mapped. Rows are numbered through all shards."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.num_tokens: int = manifest["tokens"]
        self.num_trained_tokens: int = manifest["trained_tokens"]
        self.dropped = Dropped.from_json(manifest["dropped"])
        self.members = [Store.open(folder.parent / member["store"]) for member in manifest.get("members", ())]
        self.sources = tuple(member["source"] for member in manifest.get("members", ()))
        """Names of a joined store's members."""
        shards = [_map_listed_shard(folder / shard["name"], shard) for shard in manifest["shards"]]
        shards += [shard for member in self.members for shard in member.shards]
        super().__init__(manifest["kind"], manifest["end_of_row"], shards)

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

    @cached_property
    def row_sources(self) -> np.ndarray:
        """int16: the member that each row of a joined store is from; 0 in any other."""
        return np.repeat(np.arange(max(len(self.members), 1), dtype=np.int16), [len(one) for one in self.members] or [len(self)])

    @cached_property
    def manifest_hash(self) -> str:
        """Of what was put in and what came out; the same on every machine."""
        content = {"made_from": self.manifest["made_from"], "shards": self.manifest["shards"]}
        if self.members:
            content["members"] = [member.manifest_hash for member in self.members]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Read every shard whole and compare its hash."""
        for member in self.members:
            member.verify()
        for shard in self.manifest["shards"]:
            if _sha256(self.folder / shard["name"]) != shard["sha256"]:
                raise _corrupt(self.folder / shard["name"], "does not have the contents that the manifest says")


def _map_listed_shard(path: Path, listed: Mapping[str, Any]) -> MappedShard:
    if not path.exists():
        raise _corrupt(path, "is missing")
    if path.stat().st_size != listed["bytes"]:
        raise _corrupt(path, f"has {path.stat().st_size} bytes, not the {listed['bytes']} that the manifest says")
    return map_shard(path)


def map_shard(path: Path) -> MappedShard:
    """Raises FileNotFoundError, and DataError where it is cut off."""
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except pa.ArrowInvalid as error:
        raise _corrupt(path, f"is not readable ({error})") from None
    return {
        name: _offsets_and_values(column) if pa.types.is_list(column.type) else column.to_numpy(zero_copy_only=False)
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }


def num_rows(shard: MappedShard) -> int:
    return len(shard["source"])


def _corrupt(path: Path, problem: str) -> DataError:
    return DataError(str(path), problem, f"Delete the folder {path.parent} and run prepare again.")


def _offsets_and_values(lists: Any) -> tuple[np.ndarray, np.ndarray]:
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _lists(rows: Sequence[Any], dtype: Any = np.int32) -> Any:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(_joined(rows, dtype)))


def _joined(arrays: Sequence[Any], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if len(arrays) else np.zeros(0, dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

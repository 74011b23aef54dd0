"""Samples of a token store that is still being built (data.streaming).

Shards appear in any order, each complete through its rename, and are read in order: 0, 1, 2 and so on. Their rows are cut into
windows of a fixed number of rows, independent of shard boundaries, and each window is packed and shuffled separately. So the
order of samples is a function of (seed, epoch, rows so far): neither the pace at which shards appear, nor world size, nor an
interruption changes which samples a step sees. Samples that don't fill a step are carried over to the next window.

Memory is needed for one window's row numbers; shards are memory-mapped, and unmapped once windows have passed them. Each process
compares a shard with its hash when it first reads it.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial as bound
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.kind import MappedShard, Rows, num_rows
from raytune_llm.data.samples import Begins, Ordered, Samples, permutation
from raytune_llm.data.store import FAILED, MANIFEST, OUTLINE, corrupt, map_shard, partial, read_manifest, recorded, shard_name
from raytune_llm.errors import DataError
from raytune_llm.file_hash import sha256_of

T = TypeVar("T")
POLL_S = 0.05


class Stream:
    """The samples of a store while it is built. folder: where the complete store will be."""

    num_samples = None

    def __init__(self, folder: Path, *, window_rows: int, samples: Callable[[Rows, np.ndarray], Samples]) -> None:
        """samples: makes the Samples of the rows of one window."""
        self.folder, self.window_rows, self.samples = folder, window_rows, samples
        self._compared: set[str] = set()
        """The shards that matched their hashes."""
        self._listed: dict[str, tuple[str, int]] = {}
        """The hash and the number of rows of each shard, once the store is complete."""

    def ordered(
        self, seed: int | None, epoch: int, multiple: int, stopped: threading.Event, begins: Begins = (0, 0)
    ) -> Iterator[Ordered]:
        """See SampleOrder.ordered. It waits for shards that don't exist yet. Windows before that of `begins` are not packed."""
        first, passed = begins
        rest: Samples | None = None
        origin: deque[tuple[int, int, int]] = deque()
        """The samples in `rest` as (window, number of the first sample in it, number of samples)."""
        for window, samples in enumerate(self._windows(first, stopped), start=first):
            if seed is not None:
                samples = samples.take(permutation(len(samples), seed, epoch, window))
            number = passed if window == first else 0
            if number:
                samples = samples.take(np.arange(number, len(samples)))
            origin.append((window, number, len(samples)))
            waiting = samples if rest is None else rest.followed_by(samples)
            # At least one sample is held back, so that the last part can be marked as the last.
            whole = (len(waiting) - 1) // multiple * multiple
            if whole:
                yield Ordered(waiting, np.arange(whole), last=False, begins=origin[0][:2])
            rest = waiting.take(np.arange(whole, len(waiting)))
            _drop(origin, whole)
        if rest is None:
            raise DataError(str(self.folder), "has no row that can be used", "Correct the data, or set data.format.")
        yield Ordered(rest, np.arange(len(rest)), last=True, begins=origin[0][:2])

    def _windows(self, first: int, stopped: threading.Event) -> Iterator[Samples]:
        """The samples of each window, from window number `first`."""
        outline = self._awaited(self._outline, stopped)
        shards: list[MappedShard] = []
        start, end = first * self.window_rows, 0
        """The range of rows in `shards` that are in no window yet. Its end comes first while shards are skipped."""

        def window(stop: int) -> Samples:
            return self.samples(Rows(KINDS[outline["kind"]], outline["end_of_row"], shards), np.arange(start, stop))

        for number in range(outline["num_shards"]):
            name = shard_name(number)
            sha256, rows = self._awaited(bound(self._expected, name=name), stopped)
            if rows <= start - end:
                start -= rows
                continue
            shards.append(self._awaited(bound(self._sound, name=name, sha256=sha256), stopped))
            end += num_rows(shards[-1])
            while end - start >= self.window_rows:
                yield window(start + self.window_rows)
                start += self.window_rows
            while shards and start >= (passed := num_rows(shards[0])):
                del shards[0]
                start, end = start - passed, end - passed
        if end > start:
            yield window(end)

    def _outline(self, folder: Path) -> dict[str, Any]:
        if folder != self.folder:
            return json.loads((folder / OUTLINE).read_text())
        manifest = read_manifest(folder)
        return {"num_shards": len(manifest["shards"]), "kind": manifest["kind"], "end_of_row": manifest["end_of_row"]}

    def _expected(self, folder: Path, *, name: str) -> tuple[str, int]:
        """The hash of a shard, and its number of rows."""
        if folder != self.folder:
            return recorded(folder / name)
        if not self._listed:
            self._listed = {shard["name"]: (shard["sha256"], shard["rows"]) for shard in read_manifest(folder)["shards"]}
        return self._listed[name]

    def _sound(self, folder: Path, *, name: str, sha256: str) -> MappedShard:
        """A shard, which is compared with its hash when this process first reads it."""
        path = folder / name
        if name not in self._compared:
            if sha256_of(path) != sha256:
                raise corrupt(path, "does not match its hash")
            self._compared.add(name)
        return map_shard(path)

    def _awaited(self, read: Callable[[Path], T], stopped: threading.Event) -> T:
        """The result of `read`, as soon as it raises no FileNotFoundError, and no DataError of a store under construction, where
        a damaged shard is made again. Raises DataError if the construction failed."""
        making = partial(self.folder)
        while True:
            complete = (self.folder / MANIFEST).exists()
            try:
                return read(self.folder if complete else making)
            except FileNotFoundError as error:
                if complete:
                    raise corrupt(Path(error.filename), "is missing") from None
            except DataError:
                if complete:
                    raise
            if (making / FAILED).exists():
                raise DataError(str(self.folder), f"can't be made: {(making / FAILED).read_text()}")
            if stopped.wait(POLL_S):
                raise InterruptedError("the reader of the stream has ended")


def _drop(origin: deque[tuple[int, int, int]], count: int) -> None:
    """Remove this many samples from the front."""
    while count:
        window, number, there = origin.popleft()
        if there > count:
            origin.appendleft((window, number + count, there - count))
        count -= min(there, count)

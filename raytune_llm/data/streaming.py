"""A token store to train on while it is still being made.

Its shards come in any order, each whole by its rename. What counts is the prefix: shard 0, 1, 2 and so on as far as they are
there. It is cut into windows of so many rows, whatever shards these lie in; a window is packed and shuffled for itself. So the
order of samples is a function of (seed, epoch, rows so far) alone: neither the pace at which shards come, nor world size, nor an
interruption changes what a step sees. Samples that do not fill a step are carried over into the next window.

Memory is that of a window's row numbers: shards are memory-mapped and let go when a window has passed them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.kind import MappedShard
from raytune_llm.data.samples import Ordered, Samples, permutation
from raytune_llm.data.store import FAILED, MANIFEST, OUTLINE, Rows, map_shard, num_rows, partial, shard_name
from raytune_llm.errors import DataError

T = TypeVar("T")
POLL_S = 0.05


class Stream:
    """The samples of a store that is, or will be, under construction, and whose final folder this is."""

    num_samples = None

    def __init__(self, folder: Path, *, window_rows: int, samples: Callable[[Rows, np.ndarray], Samples]) -> None:
        """`samples` packs the rows of a window."""
        self.folder, self.window_rows, self.samples = folder, window_rows, samples

    def ordered(self, seed: int | None, epoch: int, multiple: int, stopped: threading.Event) -> Iterator[Ordered]:
        """Waits for what is not there yet. A part but the last has a multiple of `multiple` samples."""
        rest: Samples | None = None
        for window, samples in enumerate(self._windows(stopped)):
            if seed is not None:
                samples = samples.take(permutation(len(samples), seed, epoch, window))
            waiting = samples if rest is None else rest.followed_by(samples)
            # A sample at least is held back, so that the last part is known to be the last.
            whole = (len(waiting) - 1) // multiple * multiple
            if whole:
                yield Ordered(waiting, np.arange(whole), last=False)
            rest = waiting.take(np.arange(whole, len(waiting)))
        if rest is None:
            raise DataError(str(self.folder), "holds no row that can be used", "Correct the data, or set data.format.")
        yield Ordered(rest, np.arange(len(rest)), last=True)

    def _windows(self, stopped: threading.Event) -> Iterator[Samples]:
        outline = self._awaited(_outline, stopped)
        shards: list[MappedShard] = []
        start = end = 0
        """Rows of these shards that no window holds yet."""

        def window(stop: int) -> Samples:
            return self.samples(Rows(KINDS[outline["kind"]], outline["end_of_row"], shards), np.arange(start, stop))

        for number in range(outline["num_shards"]):
            shards.append(self._awaited(lambda folder, number=number: map_shard(folder / shard_name(number)), stopped))
            end += num_rows(shards[-1])
            while end - start >= self.window_rows:
                yield window(start + self.window_rows)
                start += self.window_rows
            while shards and start >= (passed := num_rows(shards[0])):
                del shards[0]
                start, end = start - passed, end - passed
        if end > start:
            yield window(end)

    def _awaited(self, read: Callable[[Path], T], stopped: threading.Event) -> T:
        """What `read` finds in the store's folder, as soon as it is there."""
        making = partial(self.folder)
        while True:
            complete = (self.folder / MANIFEST).exists()
            try:
                return read(self.folder if complete else making)
            except FileNotFoundError:
                if complete:
                    raise
            if (making / FAILED).exists():
                raise DataError(str(self.folder), f"can't be made: {(making / FAILED).read_text()}")
            if stopped.wait(POLL_S):
                raise InterruptedError("the reader of the stream has ended")


def _outline(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return json.loads((folder / OUTLINE).read_text())
    return {"num_shards": len(manifest["shards"]), "kind": manifest["kind"], "end_of_row": manifest["end_of_row"]}

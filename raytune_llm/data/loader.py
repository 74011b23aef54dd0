"""Iterates over a store in one global order and gives each rank its batches.

The samples of a global step are a function of (seed, epoch, store): the next global_batch_size of `permutation(seed, epoch)`
after the cursor. World size, micro-batch size and restarts only change which rank computes which of them. The numbers that a
step needs from all ranks, such as the trained tokens that the loss is divided by, are known from lengths, without communication.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

from raytune_llm.data.batches import pinned
from raytune_llm.data.read_ahead import read_ahead
from raytune_llm.data.samples import SampleOrder, Samples
from raytune_llm.data.steps import Position, Step
from raytune_llm.records import Batch

PART = "part"
Part = tuple[int, int, int, int]
"""A part of a stream: its epoch, the samples of the epoch before it, and its `begins`."""


def _part_of(progress: Position) -> Part:
    """The part that a run resumes in, or an earlier one."""
    start = (progress.epoch, 0, 0, 0)
    epoch, passed, window, number = progress.source_state.get(PART, start)
    return (epoch, passed, window, number) if epoch == progress.epoch and passed <= progress.cursor else start


class Loader:
    """The steps of one rank over samples: a source for the loop, or one epoch of held-out rows. A thread prefetches them."""

    def __init__(
        self,
        samples: SampleOrder,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
        prefetch: int = 2,
    ) -> None:
        assert 0 <= rank < world_size
        assert samples.num_samples != 0, "an epoch without samples has no step"
        self.samples, self.seed, self.pad_id, self.shuffle, self.prefetch = samples, seed, pad_id, shuffle, prefetch
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = None if samples.num_samples is None else -(-samples.num_samples // global_batch_size)
        self._parts: deque[Part] = deque()
        """Parts of a stream from the current step's on."""
        self._reached = (0, 0)
        """Epoch and cursor of the current step."""

    def steps(self, progress: Position, policy: Any = None) -> Generator[Step]:
        """See StepSource."""
        part = _part_of(progress)
        self._parts.clear()
        with closing(self._ahead(partial(self._from, progress.epoch, progress.cursor, part))) as steps:
            for step in steps:
                self._reached = step.epoch, step.cursor
                yield step

    def state(self) -> Mapping[str, Any]:
        """Epoch and cursor are the full state. Of a stream it is also said where the current step's part begins, so that a
        resumed run need not pack what comes before."""
        while len(self._parts) > 1 and self._parts[1][:2] < self._reached:
            self._parts.popleft()
        return {PART: list(self._parts[0])} if self._parts and self._parts[0][:2] < self._reached else {}

    def epoch(self, epoch: int, cursor: int = 0) -> Generator[Step]:
        """The steps of one epoch, from sample number `cursor` on."""
        return self._ahead(partial(self._epoch, epoch, cursor, (epoch, 0, 0, 0)))

    def _ahead(self, make: Callable[[threading.Event], Iterator[Step]]) -> Generator[Step]:
        return read_ahead(make, ahead=self.prefetch, name="loader")

    def _from(self, epoch: int, cursor: int, part: Part, stopped: threading.Event) -> Iterator[Step]:
        yield from self._epoch(epoch, cursor, part, stopped)
        while True:
            epoch += 1
            yield from self._epoch(epoch, 0, (epoch, 0, 0, 0), stopped)

    def _epoch(self, epoch: int, cursor: int, first: Part, stopped: threading.Event) -> Iterator[Step]:
        passed, begins = first[1], first[2:]
        seed = self.seed if self.shuffle else None
        for part in self.samples.ordered(seed, epoch, self.global_batch_size, stopped, begins):
            samples = part.samples
            if self.samples.num_samples is None:
                self._parts.append((epoch, passed, *part.begins))
            for at in range(max(cursor - passed, 0), len(part.order), self.global_batch_size):
                step = part.order[at : at + self.global_batch_size]
                consumed = passed + at + len(step)
                ends = part.last and at + len(step) == len(part.order)
                shares = self._shares(len(step))
                rows_before = np.concatenate([[0], np.cumsum(samples.num_rows[step])])
                yield Step(
                    epoch=epoch,
                    cursor=consumed,
                    fraction=1.0 if ends else consumed / (self.samples.num_samples or math.inf),
                    batches=[self._batch(samples, step[start:end]) for start, end in shares],
                    first_rows=[int(rows_before[start]) for start, _ in shares],
                    num_rows=int(rows_before[-1]),
                    count=samples.counts[step].sum().item(),
                    tokens=int(samples.tokens[step].sum()),
                    sample_ids=tuple(step.tolist()),
                    store=samples.store.identity,
                )
            passed += len(part.order)

    def _shares(self, num_samples: int) -> list[tuple[int, int]]:
        """[start, end) of this rank's samples in the step, for each micro-batch. All ranks have the same number of
        micro-batches."""
        micro, together = self.micro_batch_size, self.micro_batch_size * self.world_size
        starts = (at + self.rank * micro for at in range(0, num_samples, together))
        return [(min(start, num_samples), min(start + micro, num_samples)) for start in starts]

    def _batch(self, samples: Samples, numbers: np.ndarray) -> Batch:
        batch = samples.batch(numbers, micro_batch_size=self.micro_batch_size, pad_id=self.pad_id)
        return pinned(batch) if torch.cuda.is_available() else batch

"""From the store to batches, in one global order.

The samples that a global step sees are a function of (seed, epoch, store) alone: `permutation(seed, epoch)[cursor:]`, so many
at a time. World size, micro-batch size and restarts only change who computes which of them. All numbers that a step needs
(the trained tokens of all ranks, by which the loss is divided) are known here from lengths, so no rank has to ask another.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from raytune_llm.data.packing import plan
from raytune_llm.data.store import Store
from raytune_llm.records import IGNORE, Batch

JOINED_MULTIPLE = 64
"""Joined rows are padded to a multiple of this, so that fewer shapes occur."""
_SPLIT, _EPOCH = 0, 1


def split(num_rows: int, eval_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and row numbers held out, both ascending."""
    num_eval = round(eval_fraction * num_rows)
    held_out = np.zeros(num_rows, bool)
    held_out[_generator(seed, _SPLIT).permutation(num_rows)[:num_eval]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's samples."""
    return _generator(seed, _EPOCH, epoch).permutation(num_samples)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))


class Samples:
    """What the order is over: packs of at most max_length tokens, or single rows."""

    def __init__(self, store: Store, rows: np.ndarray, *, max_length: int, packing: bool) -> None:
        self.store, self.max_length, self.packing = store, max_length, packing
        lengths, targets = store.lengths[rows], store.targets[rows]
        if packing:
            packs = plan(lengths, max_length)
            self._rows, self._offsets = np.asarray(rows)[packs.rows], packs.offsets
            lengths, targets = lengths[packs.rows], targets[packs.rows]
        else:
            self._rows, self._offsets = np.asarray(rows), np.arange(len(rows) + 1)
        self.tokens = _sums(lengths, self._offsets)
        """int64: real tokens of each sample."""
        self.targets = _sums(targets, self._offsets)
        """int64: trained tokens of each sample that have a predecessor."""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, sample: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """ids and spans of each row of the sample."""
        return [self.store.row(row) for row in self.row_numbers(sample).tolist()]

    def row_numbers(self, sample: int) -> np.ndarray:
        return self._rows[self._offsets[sample] : self._offsets[sample + 1]]

    def batch(self, samples: np.ndarray, *, micro_batch_size: int, pad_id: int) -> Batch:
        """The samples as one micro-batch: packs one a row, unpacked rows joined end to end in one row."""
        if self.packing:
            lines = [self[sample] for sample in samples.tolist()]
            lines += [[] for _ in range(micro_batch_size - len(lines))]
            length = self.max_length
        else:
            lines = [[row for sample in samples.tolist() for row in self[sample]]]
            joined = sum(len(ids) for ids, _ in lines[0])
            length = max(-(-joined // JOINED_MULTIPLE), 1) * JOINED_MULTIPLE
        return collate(lines, length=length, pad_id=pad_id, sample_ids=tuple(samples.tolist()))


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    passed = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=passed[1:])
    return passed[offsets[1:]] - passed[offsets[:-1]]


def collate(
    lines: list[list[tuple[np.ndarray, np.ndarray]]], *, length: int, pad_id: int, sample_ids: tuple[int, ...] = ()
) -> Batch:
    """Documents (ids and spans) end to end, one list a row of the batch, each row padded to `length` tokens.

    Padding makes documents of its own, none longer than the longest real one, so that it does not set max_seqlen.
    """
    shape = (len(lines), length)
    ids_BT = np.full(shape, pad_id, np.int64)
    labels_BT = np.full(shape, IGNORE, np.int64)
    positions_BT = np.zeros(shape, np.int64)
    longest = max((len(ids) for line in lines for ids, _ in line), default=0) or min(length, JOINED_MULTIPLE)
    ramp = np.arange(longest)
    boundaries = [0]
    for number, line in enumerate(lines):
        at = 0
        for ids, spans in line:
            end = at + len(ids)
            ids_BT[number, at:end] = ids
            positions_BT[number, at:end] = ramp[: len(ids)]
            for start, stop in spans.reshape(-1, 2).tolist():
                start = max(start, 1)  # nothing predicts the first token
                labels_BT[number, at + start - 1 : at + stop - 1] = ids[start:stop]
            boundaries.append(number * length + end)
            at = end
        while at < length:
            end = min(at + longest, length)
            positions_BT[number, at:end] = ramp[: end - at]
            boundaries.append(number * length + end)
            at = end
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        labels_BT=torch.from_numpy(labels_BT),
        positions_BT=torch.from_numpy(positions_BT),
        trained_N=torch.from_numpy(np.flatnonzero(labels_BT != IGNORE)),
        cu_seqlens_S=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=longest,
        sample_ids=sample_ids,
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step of one rank. Everything but `batches` is the same on all ranks."""

    epoch: int
    cursor: int
    """Samples of this epoch that are consumed after the step."""
    batches: list[Batch]
    """This rank's micro-batches; some of an epoch's last ones may be padding only."""
    count: int
    """Trained tokens of the step over all ranks and micro-batches: what its loss is divided by."""
    tokens: int
    """Real tokens of the step over all ranks."""
    sample_ids: tuple[int, ...]
    """The samples of the step over all ranks, in order."""


class Loader:
    """The steps of one rank, made ahead by a thread."""

    def __init__(
        self,
        samples: Samples,
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
        self.samples, self.seed, self.pad_id, self.shuffle, self.prefetch = samples, seed, pad_id, shuffle, prefetch
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = -(-len(samples) // global_batch_size)

    def steps(self, epoch: int, cursor: int = 0) -> Generator[Step]:
        """The steps of the epoch from its sample number `cursor` on. Close the iterator to stop the thread early."""
        made: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=self.prefetch)
        stopped = threading.Event()

        def hand_over(item: Step | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    return made.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def run() -> None:
            try:
                for step in self._steps(epoch, cursor):
                    hand_over(step)
                    if stopped.is_set():
                        return
                hand_over(None)
            except BaseException as error:
                hand_over(error)  # raised again where it is waited for

        thread = threading.Thread(target=run, name="loader", daemon=True)
        thread.start()
        try:
            while (item := made.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _steps(self, epoch: int, cursor: int) -> Iterator[Step]:
        num_samples = len(self.samples)
        order = permutation(num_samples, self.seed, epoch) if self.shuffle else np.arange(num_samples)
        while cursor < num_samples:
            step = order[cursor : cursor + self.global_batch_size]
            cursor += len(step)
            yield Step(
                epoch=epoch,
                cursor=cursor,
                batches=[self._batch(mine) for mine in self._shares(step)],
                count=int(self.samples.targets[step].sum()),
                tokens=int(self.samples.tokens[step].sum()),
                sample_ids=tuple(step.tolist()),
            )

    def _shares(self, step: np.ndarray) -> list[np.ndarray]:
        """This rank's samples of each micro-batch. Every rank has the same number of micro-batches."""
        micro, together = self.micro_batch_size, self.micro_batch_size * self.world_size
        return [step[at + self.rank * micro :][:micro] for at in range(0, len(step), together)]

    def _batch(self, samples: np.ndarray) -> Batch:
        batch = self.samples.batch(samples, micro_batch_size=self.micro_batch_size, pad_id=self.pad_id)
        return pinned(batch) if torch.cuda.is_available() else batch


def pinned(batch: Batch) -> Batch:
    """In page-locked memory, from which copies to a GPU do not wait."""
    return replace(
        batch,
        ids_BT=batch.ids_BT.pin_memory(),
        labels_BT=batch.labels_BT.pin_memory(),
        positions_BT=batch.positions_BT.pin_memory(),
        trained_N=batch.trained_N.pin_memory(),
        cu_seqlens_S=batch.cu_seqlens_S.pin_memory(),
    )

"""Samples: the packs or rows of an epoch, planned from the lengths of a store's rows alone, and their order."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raytune_llm.data.kinds.kind import Document, Place, Rows
from raytune_llm.data.packing import plan
from raytune_llm.data.store import Store
from raytune_llm.records import Batch

JOINED_MULTIPLE = 64
"""Unpacked rows of a batch are padded together to a multiple of this, so that fewer shapes occur."""
_SPLIT, _EPOCH = 0, 1


def split(num_rows: int, eval_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of rows to train on and of rows held out, both ascending."""
    num_eval = round(eval_fraction * num_rows)
    held_out = np.zeros(num_rows, bool)
    held_out[_generator(seed, _SPLIT).permutation(num_rows)[:num_eval]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_sources(
    store: Store, eval_fraction: float | Mapping[str, float], seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Numbers of the rows to train on, and source name -> numbers of held-out rows, all ascending.

    eval_fraction: of every source, or by source name; 1 holds out everything. The held-out rows of a source don't depend on other
    sources. A store that isn't joined is a single source with the name "".
    """
    trained: list[np.ndarray] = []
    held_out: dict[str, list[np.ndarray]] = {}
    first = 0
    for name, size in [(name, len(member)) for name, member in zip(store.sources, store.members, strict=True)] or [
        ("", len(store))
    ]:
        fraction = eval_fraction.get(name, 0.0) if isinstance(eval_fraction, Mapping) else eval_fraction
        kept, out = split(size, fraction, seed)
        trained.append(first + kept)
        if len(out):
            held_out.setdefault(name, []).append(first + out)
        first += size
    return np.concatenate(trained), {name: np.concatenate(rows) for name, rows in held_out.items()}


def permutation(num_samples: int, seed: int, epoch: int, window: int = 0) -> np.ndarray:
    """The order of an epoch's samples, or of the samples in a window of a stream."""
    return _generator(seed, _EPOCH, epoch, *([window] if window else [])).permutation(num_samples)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))


Begins = tuple[int, int]
"""Where a part of an epoch begins: (window of the stream, number of the first sample in the window's order). A complete store has
one part, which begins at (0, 0)."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """Samples of an epoch, or of a part of one, in the order in which steps use them."""

    samples: Samples
    order: np.ndarray
    last: bool
    """It is the last part of its epoch."""
    begins: Begins = (0, 0)
    """Where it begins, for `SampleOrder.ordered`."""


class SampleOrder(Protocol):
    """What a loader iterates over: the samples of a complete store, or a stream (data/streaming.py)."""

    @property
    def num_samples(self) -> int | None:
        """Samples per epoch. None: not known yet."""
        ...

    def ordered(
        self, seed: int | None, epoch: int, multiple: int, stopped: threading.Event, begins: Begins = (0, 0)
    ) -> Iterator[Ordered]:
        """An epoch in parts, all but the last with a multiple of `multiple` samples. seed=None: unshuffled.

        stopped: set when the samples are not needed any more. begins: where the first part begins.
        """
        ...


class Samples:
    """The samples of an epoch: packs of max_length tokens (twice that for pairs, which have two documents), or single rows.

    Plain texts are packed end to end: all rows are concatenated and cut every max_length tokens, so that only the last sample is
    not full and a row may be spread over several samples.
    """

    def __init__(
        self,
        store: Rows,
        rows: np.ndarray,
        *,
        max_length: int,
        packing: bool,
        share_prompts: bool = False,
        in_lines: bool = False,
    ) -> None:
        """rows: numbers of rows; a number that occurs twice is used twice per epoch. share_prompts: the prompt of a pair is
        computed once for both answers. in_lines: each document gets a row of the batch for itself."""
        assert not (in_lines and (packing or share_prompts)), "a pack is a line of several documents"
        self.store, self.max_length, self.packing, self.share_prompts = store, max_length, packing, share_prompts
        self.in_lines = in_lines
        self.kind = store.kind
        self.capacity = max_length * self.kind.sides
        """Maximum tokens of a pack."""
        self.rows = rows = np.asarray(rows)
        partners = np.roll(rows, 1)
        lengths, room = self.kind.sizes(store, rows, partners, max_length=max_length, share_prompts=share_prompts)
        starts = np.zeros_like(lengths)
        self._cut = packing and self.kind.end_to_end
        if self._cut:
            order, starts, lengths, self._offsets = _blocks(lengths, max_length)
        elif packing:
            packs = plan(room, self.capacity)
            order, self._offsets = packs.rows, packs.offsets
            lengths = lengths[order]
        else:
            order, self._offsets = np.arange(len(rows)), np.arange(len(rows) + 1)
        self._rows, self._partners, self._starts, self._lengths = rows[order], partners[order], starts, lengths
        self.tokens = _sums(lengths, self._offsets)
        """int64 [samples]: tokens of each sample, without padding."""
        self.counts = _sums(lengths - 1 if self._cut else store.counts[self._rows], self._offsets)
        """int64, or float64 with weights [samples]: each sample's part of the number that the loss is divided by: trained tokens
        with a predecessor times their weights, or pairs, or labelled rows."""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_samples(self) -> int:
        return len(self)

    def ordered(
        self, seed: int | None, epoch: int, multiple: int, stopped: threading.Event, begins: Begins = (0, 0)
    ) -> Iterator[Ordered]:
        order = np.arange(len(self)) if seed is None else permutation(len(self), seed, epoch)
        yield Ordered(self, order, last=True)

    @property
    def trained_tokens(self) -> int:
        """Trained tokens per epoch."""
        return int(self.counts.sum() if self._cut else self.store.trained[self._rows].sum())

    def over(self, rows: np.ndarray) -> Samples:
        """The samples of other rows of the same store, with the same settings."""
        settings = {"packing": self.packing, "share_prompts": self.share_prompts, "in_lines": self.in_lines}
        return Samples(self.store, rows, max_length=self.max_length, **settings)

    def take(self, samples: np.ndarray) -> Samples:
        """These samples in this order, with only the shards that they are in."""
        sizes = np.diff(self._offsets)[samples]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(offsets[-1]) + np.repeat(self._offsets[samples] - offsets[:-1], sizes)
        store, numbers = self.store.only(np.concatenate([self._rows[places], self._partners[places]]))
        rows, partners = np.split(numbers, 2)
        return self._changed(
            store,
            rows,
            partners,
            self._starts[places],
            self._lengths[places],
            offsets,
            self.tokens[samples],
            self.counts[samples],
        )

    def followed_by(self, others: Samples) -> Samples:
        """These samples, followed by those of other rows of the same kind."""
        store = Rows(self.store.kind, self.store.end_of_row, [*self.store.shards, *others.store.shards])
        first = self.store.num_rows
        return self._changed(
            store,
            np.concatenate([self._rows, others._rows + first]),
            np.concatenate([self._partners, others._partners + first]),
            np.concatenate([self._starts, others._starts]),
            np.concatenate([self._lengths, others._lengths]),
            np.concatenate([self._offsets, self._offsets[-1] + others._offsets[1:]]),
            np.concatenate([self.tokens, others.tokens]),
            np.concatenate([self.counts, others.counts]),
        )

    def _changed(self, store: Rows, rows: np.ndarray, partners: np.ndarray, *arrays: np.ndarray) -> Samples:
        changed = copy(self)
        changed.store, changed.rows, changed._rows, changed._partners = store, np.unique(rows), rows, partners
        changed._starts, changed._lengths, changed._offsets, changed.tokens, changed.counts = arrays
        return changed

    def __getitem__(self, sample: int) -> list[Document]:
        """The documents of the sample."""
        documents: list[Document] = []
        for place in range(self._offsets[sample], self._offsets[sample + 1]):
            numbers = (self._rows[place], self._partners[place], self._starts[place], self._lengths[place])
            documents += self.kind.documents(
                self.store, Place(*map(int, numbers)), max_length=self.max_length, share_prompts=self.share_prompts
            )
        return documents

    @property
    def num_rows(self) -> np.ndarray:
        """int64 [samples]: rows of each sample; pieces of rows if texts are packed end to end."""
        return np.diff(self._offsets)

    def batch(self, samples: np.ndarray, *, micro_batch_size: int, pad_id: int) -> Batch:
        """One micro-batch of these samples: one pack per row of the batch, or unpacked rows end to end in a single row, or each
        document in a row of the batch for itself."""
        from raytune_llm.data.batches import assemble, dealt  # imports torch, which takes seconds and is not needed for counting

        if self.packing:
            lines = [self[sample] for sample in samples.tolist()]
            lines += [[] for _ in range(micro_batch_size - len(lines))]
            length = self.capacity
        else:
            lines = [[document for sample in samples.tolist() for document in self[sample]]]
            together = max if self.in_lines else sum
            longest = max(together([len(document.ids) for document in line] or [0]) for (line,) in dealt(self.kind, lines))
            length = max(-(-longest // JOINED_MULTIPLE), 1) * JOINED_MULTIPLE
        spans = (slice(*self._offsets[sample : sample + 2].tolist()) for sample in samples.tolist())
        places = np.r_[(slice(0, 0), *spans)]
        return assemble(
            self.store,
            lines,
            self._rows[places],
            self._partners[places],
            length=length,
            pad_id=pad_id,
            sample_ids=tuple(samples.tolist()),
            count=self.counts[samples].sum().item(),
            in_lines=self.in_lines,
        )


def _blocks(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Concatenates rows and cuts them every `size` tokens. Returns each piece's row, start in the row and length, and the
    offsets of the blocks among the pieces."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(0, total, size)
    edges = np.union1d(ends, np.append(cuts, total))
    starts = edges[:-1]
    rows = np.searchsorted(ends, starts, side="right")
    offsets = np.append(np.searchsorted(starts, cuts), len(starts))
    return rows, starts - (ends - lengths)[rows], np.diff(edges), offsets


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    passed = np.zeros(len(values) + 1, np.result_type(values, np.int64))
    np.cumsum(values, out=passed[1:])
    return passed[offsets[1:]] - passed[offsets[:-1]]

"""The scheduler: which rows a step computes, and how many tokens of each. Continuous batching with chunked prefill.

Running rows come first, in order of age, each with its next token. The step's remaining tokens go to prompts, in chunks. A row
waits for a place in the batch, for blocks of the cache, or for a slot of its adapter; rows without an adapter need no slot. If
blocks run out, the youngest row is preempted: it releases its blocks and is computed again later, with the same tokens and random
numbers. The oldest row thus always completes.

An adapter with a steady stream of rows could keep its slot forever. So a row that waits for a slot lets younger rows of other
adapters start before it for only PATIENCE_S seconds. After that, none of them starts, and a slot becomes free when its rows are
done. Rows of pinned adapters still start, since their slots never become free.

Requests that are computed in separate passes (passes.py) wait for slots like rows, and take turns.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from raytune_llm.engines.native.blocks import BlockPool
from raytune_llm.engines.native.passes import Passes
from raytune_llm.engines.native.row import Row
from raytune_llm.engines.native.slots import Slots

PATIENCE_S = 0.25


class Piece(NamedTuple):
    """The part of one row that a step computes."""

    row: Row
    start: int
    stop: int
    """The range of the row's tokens; those before `start` are in the cache."""

    @property
    def samples(self) -> bool:
        """Whether it has the row's last token, after which the next one is sampled."""
        return self.stop == len(self.row.ids)


class Scheduler:
    def __init__(
        self,
        blocks: BlockPool,
        slots: Slots | None,
        *,
        max_rows: int,
        step_tokens: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """step_tokens: the maximum number of tokens in a step. slots: None if adapters are not supported."""
        assert step_tokens >= max_rows, (step_tokens, max_rows)
        self.blocks, self.slots = blocks, slots
        self.running: list[Row] = []
        """The oldest first."""
        self.waiting: deque[Row] = deque()
        self.passes: deque[Passes] = deque()
        """In the order of their turns."""
        self.preemptions = 0
        self.prefix_hits = self.prefix_queries = 0
        self._max_rows, self._step_tokens, self._now = max_rows, step_tokens, now

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def schedule(self) -> list[Piece]:
        """The step's pieces, decoding rows first; empty if nothing can be computed."""
        budget = self._step_tokens
        pieces: list[Piece] = []
        for row in sorted(self.running, key=lambda row: row.pending > 1):
            if row.complete:
                continue
            size = min(row.pending, budget)
            if size and row in self.running and self._grow(row, row.computed + size):
                pieces.append(Piece(row, row.computed, row.computed + size))
                budget -= size
        for row in filter(self._admitted(), tuple(self.waiting)):
            if not budget:
                break
            if self._start(row):
                size = min(row.pending, budget)
                pieces.append(Piece(row, row.computed, row.computed + size))
                budget -= size
            elif row.blocked_on not in ("adapter", "weights"):
                break  # keep the order, so that small rows can't overtake a large one forever
        # A row may have been preempted after its piece was added.
        return [piece for piece in pieces if piece.row.blocks]

    def computed(self, piece: Piece) -> None:
        """To be called when the piece is computed and its tokens are known. Adds full blocks to the prefix cache."""
        row, size = piece.row, self.blocks.block_size
        before, full = piece.start // size, piece.stop // size
        if full > before:
            for block, digest in zip(row.blocks[before:full], row.digests(full, size)[before:], strict=True):
                self.blocks.publish(block, digest)

    def end(self, row: Row) -> None:
        """Remove a row that is complete or cancelled."""
        if row in self.running:
            self.running.remove(row)
            self._leave(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def next_passes(self) -> Passes | None:
        """The request whose turn it is to compute a pass; None if there is none, or all wait for slots."""
        if not self.passes:
            return None
        admitted = self._admitted()
        for _ in range(len(self.passes)):
            one = self.passes[0]
            self.passes.rotate(-1)
            if admitted(one) and self._take_slot(one):
                one.begun, one.blocked_on = True, None
                return one
        return None

    def give_back_slot(self, one: Row | Passes) -> None:
        if one.adapter is not None:
            assert self.slots is not None
            self.slots.give_back(one.adapter)
            one.slot = -1

    def waiting_by_reason(self) -> Mapping[str, int]:
        # Copied in one operation, since other threads call this while the loop changes the rows.
        rows, passes = tuple(self.waiting), tuple(self.passes)
        return Counter(one.blocked_on or "rows" for one in (*rows, *(one for one in passes if one.waits)))

    def waiting_adapters(self) -> tuple[str, ...]:
        rows, passes = tuple(self.waiting), tuple(self.passes)
        waiting = (*rows, *(one for one in passes if one.waits))
        return tuple(sorted({one.adapter.name for one in waiting if one.adapter is not None}))

    def _admitted(self) -> Callable[[Row | Passes], bool]:
        """A function: whether a waiting row or request may start before the oldest one that waits for a slot."""
        blocked = [one for one in (*self.waiting, *self.passes) if one.blocked_on == "adapter"]
        oldest = min((one.arrived for one in blocked), default=None)
        if oldest is None or self._now() - oldest < PATIENCE_S:
            return lambda one: True
        return lambda one: one.adapter is None or one.arrived <= oldest or (one.adapter.pinned and one.adapter.slot is not None)

    def _take_slot(self, one: Row | Passes) -> bool:
        """Take a slot for its adapter, if it has one. Returns False if no slot is free."""
        if one.adapter is None:
            return True
        assert self.slots is not None
        slot = self.slots.take(one.adapter)
        if slot is None:
            one.blocked_on = "adapter" if one.adapter.weights is not None else "weights"
            return False
        one.slot = slot
        return True

    def _start(self, row: Row) -> bool:
        """Start the row if a place in the batch, a slot and blocks are free. Returns False otherwise."""
        if len(self.running) >= self._max_rows:
            row.blocked_on = "rows"
            return False
        size = self.blocks.block_size
        # The last token is always computed, since the next one is sampled from its logits.
        digests = row.digests((len(row.ids) - 1) // size, size)
        found = self.blocks.cached_prefix(digests)
        new = self.blocks.allocate(self.blocks.blocks_for(len(row.ids)) - len(found))
        if new is None:
            self.blocks.release(found)
            row.blocked_on = "cache"
            return False
        if not self._take_slot(row):
            self.blocks.release([*found, *new])
            return False
        row.blocks, row.computed, row.blocked_on = [*found, *new], len(found) * size, None
        if row.queued_s is None:
            row.queued_s = self._now() - row.arrived
        if not row.answer:
            row.cached_tokens = row.computed
            self.prefix_hits += row.computed
            self.prefix_queries += row.prompt_tokens
        self.waiting.remove(row)
        self.running.append(row)
        self.running.sort(key=lambda row: row.arrived)
        return True

    def _grow(self, row: Row, tokens: int) -> bool:
        """Allocate blocks for this many tokens of the row, preempting the youngest rows. Returns False if it was itself
        preempted."""
        missing = self.blocks.blocks_for(tokens) - len(row.blocks)
        if missing <= 0:
            return True
        while (new := self.blocks.allocate(missing)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is row:
                return False
        row.blocks += new
        return True

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self.running.remove(row)
        self._leave(row)
        row.blocked_on = "cache"
        self.waiting.appendleft(row)

    def _leave(self, row: Row) -> None:
        self.blocks.release(row.blocks)
        row.blocks, row.computed = [], 0
        self.give_back_slot(row)

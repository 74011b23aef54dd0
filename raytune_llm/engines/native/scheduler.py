"""Which rows a step computes, and how many tokens of each: continuous batching with chunked prompts.

Rows that run come first, the oldest first, each with its next token; what is left of the step's tokens goes to prompts, in
chunks. A row waits for one of the batch's rows, for blocks of the cache, or for a slot of its adapter; rows of the base never
wait for a slot. Where blocks run out while rows grow, the youngest row gives all of its up and is computed again later (its
tokens and its draws stay), so that the oldest always gets to its end.

An adapter whose rows keep coming could keep its slot for ever. So a row that waits for a slot lets younger rows of other adapters
pass for `PATIENCE_S` only; then none of them starts before it does, and a slot falls free when its rows are done. Rows of an
adapter that is pinned in its slot still pass, since that slot never falls free.

Requests that are computed in passes of their own (passes.py) wait for slots as rows do, and take turns.
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
    """What a step computes of one row."""

    row: Row
    start: int
    stop: int
    """A range of the row's tokens; those before `start` are in the cache."""

    @property
    def samples(self) -> bool:
        """Its last token is among them: the next one is drawn."""
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
        """step_tokens: a step computes at most so many. slots: None where no adapter can be used."""
        assert step_tokens >= max_rows, (step_tokens, max_rows)
        self.blocks, self.slots = blocks, slots
        self.running: list[Row] = []
        """The oldest first."""
        self.waiting: deque[Row] = deque()
        self.passes: deque[Passes] = deque()
        """The one whose turn is next first."""
        self.preemptions = 0
        self.prefix_hits = self.prefix_queries = 0
        self._max_rows, self._step_tokens, self._now = max_rows, step_tokens, now

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def schedule(self) -> list[Piece]:
        """The step's pieces, decoding rows first; none where nothing can be computed."""
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
                break  # in their order: a small row does not pass by a large one for ever
        # A row may have been preempted after its piece was cut.
        return [piece for piece in pieces if piece.row.blocks]

    def computed(self, piece: Piece) -> None:
        """The step is done, and its tokens are known: full blocks may be found by others."""
        row, size = piece.row, self.blocks.block_size
        before, full = piece.start // size, piece.stop // size
        if full > before:
            for block, digest in zip(row.blocks[before:full], row.digests(full, size)[before:], strict=True):
                self.blocks.publish(block, digest)

    def end(self, row: Row) -> None:
        """It is done, or nobody waits for it."""
        if row in self.running:
            self.running.remove(row)
            self._leave(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def next_passes(self) -> Passes | None:
        """The request of which a pass is computed now; None where there is none, or all wait."""
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
        # At once: other threads ask, while the loop changes them.
        rows, passes = tuple(self.waiting), tuple(self.passes)
        return Counter(one.blocked_on or "rows" for one in (*rows, *(one for one in passes if one.waits)))

    def waiting_adapters(self) -> tuple[str, ...]:
        rows, passes = tuple(self.waiting), tuple(self.passes)
        waiting = (*rows, *(one for one in passes if one.waits))
        return tuple(sorted({one.adapter.name for one in waiting if one.adapter is not None}))

    def _admitted(self) -> Callable[[Row | Passes], bool]:
        """Says of one that waits whether it may start before the oldest one that waits for a slot."""
        blocked = [one for one in (*self.waiting, *self.passes) if one.blocked_on == "adapter"]
        oldest = min((one.arrived for one in blocked), default=None)
        if oldest is None or self._now() - oldest < PATIENCE_S:
            return lambda one: True
        return lambda one: one.adapter is None or one.arrived <= oldest or (one.adapter.pinned and one.adapter.slot is not None)

    def _take_slot(self, one: Row | Passes) -> bool:
        """A slot with its adapter, where it has one."""
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
        """Let it run, where a row, a slot and blocks are free for it."""
        if len(self.running) >= self._max_rows:
            row.blocked_on = "rows"
            return False
        size = self.blocks.block_size
        # The last token is always computed: it is what the next one is drawn from.
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
        """Blocks for so many tokens of it, at the expense of the youngest rows; False where it had to give up its own."""
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

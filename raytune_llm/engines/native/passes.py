"""Requests that need no generation: embeddings, scores of a reward model, log-probabilities of given answers.

A request may have hundreds of texts. They are computed in packs of a step's tokens. Between two steps, the engine computes one
pack of one request, in round-robin order, so that generation continues meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from raytune_llm.engines.native.slots import Adapter

Pass = Callable[[int], Sequence[Any]]
"""(slot of the adapter, -1: none) -> the results of a pack's texts."""


@dataclass(eq=False)
class Passes:
    """The passes of one request."""

    passes: Iterator[Pass]
    """The passes to compute. An iterator, since the next one may depend on earlier results."""
    adapter: Adapter | None
    """None: no adapter."""
    future: Future[list[Any]] = field(default_factory=Future)
    """One result per text. It may be cancelled at any time."""
    results: list[Any] = field(default_factory=list)
    slot: int = -1
    """The adapter's slot during a pass. Between two passes, other adapters may use it."""
    begun: bool = False
    arrived: float = field(default_factory=time.monotonic)
    blocked_on: str | None = None
    """Why it waits."""
    _next: Pass | None = field(init=False)

    def __post_init__(self) -> None:
        self._next = next(self.passes, None)

    @property
    def left(self) -> bool:
        """Whether there is a pass to compute."""
        return self._next is not None

    @property
    def waits(self) -> bool:
        return not self.begun or self.blocked_on is not None

    def compute(self) -> None:
        """Compute the next pass."""
        assert self._next is not None
        self.results += self._next(self.slot)
        self._next = next(self.passes, None)

    def complete(self) -> None:
        with suppress(InvalidStateError):  # cancelled: nobody waits for it
            self.future.set_result(self.results)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # as above, or it was told already
            self.future.set_exception(error)


def in_packs(sizes: Sequence[int], limit: int) -> list[slice]:
    """Slices of consecutive texts with at most `limit` tokens in total, or a single longer text."""
    packs: list[slice] = []
    start = tokens = 0
    for at, size in enumerate(sizes):
        if at > start and tokens + size > limit:
            packs.append(slice(start, at))
            start, tokens = at, 0
        tokens += size
    return [*packs, slice(start, len(sizes))] if sizes else []

"""Given texts that are computed without the paged cache: embeddings, scores of a reward model, log-probabilities of answers.

A request may hold hundreds of texts. They are computed in packs of a step's tokens, and between two steps of the engine one pack
of one request is computed, each request in turn: answers that are being generated go on meanwhile.
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
"""The results of a pack's texts, computed with the adapter in this slot; -1: the base alone."""


@dataclass(eq=False)
class Passes:
    """One request."""

    passes: Iterator[Pass]
    """The next one may depend on what was computed."""
    adapter: Adapter | None
    """None: the base alone."""
    future: Future[list[Any]] = field(default_factory=Future)
    """One result a text. It may be cancelled at any time."""
    results: list[Any] = field(default_factory=list)
    slot: int = -1
    """The adapter's slot, during a pass: between two of them, others may have it."""
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
        """The next pass."""
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
    """Neighbours together: in each pack at most `limit` tokens, or one text."""
    packs: list[slice] = []
    start = tokens = 0
    for at, size in enumerate(sizes):
        if at > start and tokens + size > limit:
            packs.append(slice(start, at))
            start, tokens = at, 0
        tokens += size
    return [*packs, slice(start, len(sizes))] if sizes else []

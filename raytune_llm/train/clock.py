from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Rate(NamedTuple):
    """Rates per second, over all workers."""

    tokens: float
    """Tokens without padding."""
    attention_pairs: float
    """Query-key pairs (Batch.attention_pairs)."""


class Clock:
    """The rate of training between two readings, without the time of evaluation and checkpoints."""

    def __init__(self) -> None:
        self.latest: Rate | None = None
        self._tokens = self._attention_pairs = 0
        self._total, self._warm = (0, 0, 0.0), (0, 0, 0.0)  # _warm excludes the first reading, with compilation and warm-up
        self._since, self._paused_s, self._waited_s = 0.0, 0.0, 0.0
        self.data_wait = 0.0
        """Fraction of the time between the last two readings in which the source of steps had none ready."""

    def start(self) -> None:
        self._since, self._paused_s, self._waited_s = time.perf_counter(), 0.0, 0.0

    def stepped(self, tokens: int, attention_pairs: int) -> None:
        self._tokens, self._attention_pairs = self._tokens + tokens, self._attention_pairs + attention_pairs

    def read(self) -> Rate:
        """The rates since the last reading, or since the start."""
        now = time.perf_counter()
        found = self._tokens, self._attention_pairs, now - self._since - self._paused_s
        if self.latest is not None:
            self._warm = _sum(self._warm, found)
        self._total = _sum(self._total, found)
        self.data_wait = self._waited_s / found[2]
        self._tokens, self._attention_pairs, self._since, self._paused_s, self._waited_s = 0, 0, now, 0.0, 0.0
        self.latest = _rate(*found)
        return self.latest

    def rate(self) -> Rate | None:
        """The rates over the run, without the first reading (which includes compilation and warm-up) if there are more."""
        return _rate(*(self._warm if self._warm[2] else self._total)) if self.latest is not None else None

    def awaited(self, steps: Iterator[T]) -> Iterator[T]:
        """Yields the same steps, and measures how long each was waited for."""
        while True:
            began = time.perf_counter()
            try:
                step = next(steps)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - began
            yield step

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began


def _sum(a: tuple[int, int, float], b: tuple[int, int, float]) -> tuple[int, int, float]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _rate(tokens: int, attention_pairs: int, seconds: float) -> Rate:
    return Rate(tokens / seconds, attention_pairs / seconds)

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Real tokens per second of training between two readings, without what is spent on evaluation and checkpoints."""

    def __init__(self) -> None:
        self.tokens = 0
        self._total_tokens, self._total_s = 0, 0.0
        self._warm_tokens, self._warm_s = 0, 0.0  # without the first reading, which holds warming up
        self._since, self._paused_s = 0.0, 0.0

    def start(self) -> None:
        self._since, self._paused_s = time.perf_counter(), 0.0

    def read(self) -> float:
        """Since the last reading, or the start."""
        now = time.perf_counter()
        seconds = now - self._since - self._paused_s
        if self._total_s:
            self._warm_tokens, self._warm_s = self._warm_tokens + self.tokens, self._warm_s + seconds
        self._total_tokens, self._total_s = self._total_tokens + self.tokens, self._total_s + seconds
        rate = self.tokens / seconds
        self.tokens, self._since, self._paused_s = 0, now, 0.0
        return rate

    def rate(self) -> float | None:
        """Over the run, without what warming up distorts where there is more than one reading."""
        if self._warm_s:
            return self._warm_tokens / self._warm_s
        return self._total_tokens / self._total_s if self._total_s else None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

"""What takes long says what it is and how far it is; what is quick says nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raytune_llm.report.news import Notice

FIRST_AFTER_S = 2.0
THEN_EVERY_S = 10.0
"""Then twice as long each time, up to a minute."""
AT_MOST_S = 60.0


def say_nothing(news: object) -> None:
    """For workers but the first."""


class Task:
    """Something under way. `of` may be called from time to time, with how much of it is done."""

    def __init__(self) -> None:
        self.part: tuple[int, int] | None = None

    def of(self, done: int, total: int) -> None:
        self.part = (done, total)


@contextmanager
def told_if_slow(tell: Callable[[Notice], None], what: str, *, first_after_s: float = FIRST_AFTER_S) -> Iterator[Task]:
    """Where the block takes longer than a moment, `tell` gets a line, then one now and then, and one at its end."""
    task, began, ended = Task(), time.monotonic(), threading.Event()

    def watch() -> None:
        wait_s = first_after_s
        while not ended.wait(wait_s):
            tell(Notice(text=_line(what, task, time.monotonic() - began)))
            wait_s = min(max(2 * wait_s, THEN_EVERY_S), AT_MOST_S)

    watcher = threading.Thread(target=watch, name="slow", daemon=True)
    watcher.start()
    try:
        yield task
    finally:
        ended.set()
        watcher.join()
    if (took_s := time.monotonic() - began) > first_after_s:
        tell(Notice(text=f"{what}: done in {took_s:.0f} s"))


def _line(what: str, task: Task, seconds: float) -> str:
    part = "" if task.part is None else f"{task.part[0]:,} of {task.part[1]:,}, "
    return f"{what} ({part}{seconds:.0f} s)"

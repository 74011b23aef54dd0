"""Notices of tasks that take long: what the task is, and how much of it is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raytune_llm.report.updates import Notice

FIRST_AFTER_S = 2.0
MIN_INTERVAL_S, MAX_INTERVAL_S = 10.0, 60.0
"""Between two notices. The interval doubles each time."""


def ignore(update: object) -> None:
    """The callback of workers whose rank is not 0."""


class Task:
    """A task that is being watched."""

    def __init__(self) -> None:
        self.part: tuple[int, int] | None = None

    def of(self, done: int, total: int) -> None:
        """Notices say from now on that `done` of `total` are done."""
        self.part = (done, total)


@contextmanager
def notify_if_slow(notify: Callable[[Notice], None], what: str, *, first_after_s: float = FIRST_AFTER_S) -> Iterator[Task]:
    """`notify` gets a notice if the block takes longer than first_after_s, more at growing intervals, and one at its end.

    what: the task, in the form "loading the model". `notify` is called in another thread.
    """
    task, began, ended = Task(), time.monotonic(), threading.Event()

    def watch() -> None:
        wait_s = first_after_s
        while not ended.wait(wait_s):
            notify(Notice(text=_line(what, task, time.monotonic() - began)))
            wait_s = min(max(2 * wait_s, MIN_INTERVAL_S), MAX_INTERVAL_S)

    watcher = threading.Thread(target=watch, name="slow", daemon=True)
    watcher.start()
    try:
        yield task
    finally:
        ended.set()
        watcher.join()
    if (took_s := time.monotonic() - began) > first_after_s:
        notify(Notice(text=f"{what}: done in {took_s:.0f} s"))


def _line(what: str, task: Task, seconds: float) -> str:
    part = "" if task.part is None else f"{task.part[0]:,} of {task.part[1]:,}, "
    return f"{what} ({part}{seconds:.0f} s)"

"""Running CPU work of torch in a temporary thread.

OpenMP keeps a team of worker threads for every thread that ever computed in parallel. As long as all teams together have no more
threads than there are cores, idle workers spin for a moment. Beyond that, they sleep after each operation, and waking them takes
longer than most operations of a decoding step (`second_team` of `scripts/bench decode`). So whatever a server computes outside of
its engine's thread (loading a model, reading an adapter) must not leave a team behind.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with it, and return or raise its result."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # the caller's
            done.set_exception(error)

    thread = Thread(target=run, daemon=True, name="apart")
    thread.start()
    try:
        return done.result()
    finally:
        if done.done():  # an interrupt of the caller doesn't wait for the work
            thread.join()

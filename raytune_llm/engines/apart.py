"""Work for torch on a CPU in a thread that ends with it.

OpenMP keeps a team of threads for every thread that ever computed in parallel. While all teams together are no more than the
cores, a team that has nothing to do waits awake for a moment; beyond that, its threads sleep after each operation, and to wake
them costs more than most operations of a decoding step: with a second team, a step took twice as long (SmolLM2, two cores). So
what a server computes beside its engine's own thread (loading a model, reading an adapter) must leave no team behind.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """What it gives, or raises."""
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

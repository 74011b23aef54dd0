"""Runs an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.1


def read_ahead(make: Callable[[threading.Event], Iterable[T]], *, ahead: int, name: str) -> Generator[T]:
    """The items of `make(stopped)`, up to `ahead` of them computed in advance. Close the generator to stop the thread early.

    The event `stopped` is set when no more items are wanted. An error in the thread is raised here.
    """
    made: queue.Queue[T | _End] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def hand_over(item: T | _End) -> None:
        while not stopped.is_set():
            try:
                return made.put(item, timeout=POLL_S)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in make(stopped):
                hand_over(item)
                if stopped.is_set():
                    return
            hand_over(_End(None))
        except BaseException as error:
            hand_over(_End(error))

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join()


class _End:
    """Marks the end of the items, or an error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

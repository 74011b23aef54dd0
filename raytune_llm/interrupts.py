"""Signals that end a command: Ctrl-C from a user (exit code 130) and SIGTERM from a system (143). Both end it the same way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came. It is a KeyboardInterrupt, so that whatever cleans up after Ctrl-C cleans up after it too."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """128 plus the signal's number, as shells report it."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def interrupt_main_thread() -> None:
    """Raise KeyboardInterrupt in the main thread, from another one. A command in the background of a script ignores SIGINT;
    it gets SIGTERM. Nothing is raised if neither has a handler."""
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    if handled:
        signal.pthread_kill(threading.main_thread().ident or 0, handled[0])


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within this context, SIGTERM raises Terminated in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def handler_kept() -> Iterator[None]:
    """Restore SIGTERM's handler at the end, where a library (Ray) replaces it. If the library's handler exits within this
    context, Terminated is raised instead."""
    before = signal.getsignal(signal.SIGTERM)
    is_handled = callable(before)
    try:
        yield
    except SystemExit:
        if is_handled:
            raise Terminated from None
        raise
    finally:
        if is_handled and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class Later:
    """Signals that came after the first one."""

    def __init__(self) -> None:
        self.first: KeyboardInterrupt | None = None
        self.number = 0

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.first is not None:
            self.number += 1
            return
        self.first = Terminated() if signum == signal.SIGTERM else KeyboardInterrupt()
        raise self.first


@contextmanager
def first_signal_raises() -> Iterator[Later]:
    """Within this context, the first Ctrl-C or SIGTERM raises KeyboardInterrupt or Terminated in the main thread. Later ones are
    counted instead of cutting a shutdown short; the shutdown reads the count to hurry."""
    later = Later()
    if threading.current_thread() is not threading.main_thread():
        yield later
        return
    before = {number: signal.signal(number, later.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield later
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

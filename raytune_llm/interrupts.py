"""What asks a command to end: Ctrl-C of a user (exit code 130), and SIGTERM of a system (143), which ends it the same way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came: whatever cleans up after Ctrl-C does it then, too."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As shells have it: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def heard() -> Iterator[None]:
    """Meanwhile SIGTERM raises Terminated in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def kept() -> Iterator[None]:
    """What SIGTERM did before it does again afterwards, whatever a library (Ray) makes of it: its own handler, which exits, is
    taken for Terminated meanwhile."""
    hears = signal.getsignal(signal.SIGTERM) is terminate
    try:
        yield
    except SystemExit:
        if hears:
            raise Terminated from None
        raise
    finally:
        if hears and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)

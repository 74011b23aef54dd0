from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.unit.serve.conftest import KEY, Server, server

__all__ = ["server"]
TIMEOUT_S = 60


class Typist:
    """Somebody at a terminal, talking with the verb `chat`."""

    def __init__(self, *settings: str) -> None:
        self._screen, theirs = pty.openpty()
        command = [sys.executable, "-m", "raytune_llm", "chat", *settings]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(theirs)
        self.shown = ""

    def sees(self, *wanted: str, within_s: float = TIMEOUT_S) -> str:
        """What is shown from here on, until all of that is there."""
        seen, until = "", time.monotonic() + within_s
        while not all(one in seen for one in wanted):
            assert time.monotonic() < until, f"{wanted} not in {seen!r}"
            if select.select([self._screen], [], [], 0.2)[0]:
                try:
                    seen += os.read(self._screen, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended, with {seen!r}") from None
        self.shown += seen
        return seen

    def types(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def says(self, text: str, *wanted: str) -> str:
        self.types(text + "\r")
        return self.sees(*wanted)

    def interrupts(self, *wanted: str) -> str:
        """Ctrl-C at the prompt until all of that is shown: of one just before it waits, Python hears with the next key."""
        for _ in range(10):
            self.types("\x03")
            with suppress(AssertionError):
                return self.sees(*wanted, within_s=TIMEOUT_S / 10)
        raise AssertionError(f"Ctrl-C did not show {wanted}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._screen)


def _own_terminal() -> None:
    """So that Ctrl-C comes as a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def chat(server: Server) -> Iterator[Callable[..., Typist]]:
    """The verb at a terminal, with the server over a toy model: chat(setting, ...)."""
    begun: list[Typist] = []

    def begin(*settings: str) -> Typist:
        begun.append(
            Typist(f"chat.url={server.url}", f"chat.api_key={KEY}", "chat.max_tokens=6", "chat.temperature=0", *settings)
        )
        begun[-1].sees("/help lists", "> ")
        return begun[-1]

    yield begin
    for typist in begun:
        typist.close()

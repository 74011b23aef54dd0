from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable

import pytest

from raytune_llm import interrupts
from raytune_llm.cluster.jobs import Jobs


class Silent(Jobs):
    """A job that writes one line and then nothing."""

    def __init__(self) -> None:
        self.closed = False

    async def _lines(self, job: str, on_reconnect: Callable[[str], None]) -> AsyncGenerator[str, None]:
        try:
            yield "a line"
            await asyncio.sleep(60)
        finally:
            self.closed = True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_job_s_next_line(number: signal.Signals) -> None:
    jobs, ends = Silent(), threading.Timer(0.2, os.kill, (os.getpid(), number))
    with interrupts.sigterm_raises(), pytest.raises(KeyboardInterrupt) as interrupt:
        [ends.start() for _ in jobs.lines("job", print)]
    assert interrupts.exit_code(interrupt.value) == 128 + number
    assert jobs.closed

"""Whether the process of a Ray actor still runs. [ray]

Ray notices a process that has died and a node that is gone, but waits without limit for a process that stands still: one that is
stopped, or waits for storage in the kernel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)
PULSE = "pulse"
PULSE_GROUP = {PULSE: 1}
"""The concurrency group of `pulse`, for the actor's options. It has a thread beside those of the actor's other calls."""
LOOK_EVERY_S = 2.0
SAID_AFTER_S = 60.0


class Beating:
    """The base of an actor that a Pulse can ask."""

    progress: tuple[int, int] | None = None
    """How much of its call is done, and of how much; None: the call does not tell."""

    def pulse(self) -> tuple[int, int] | None:
        """Its return is the answer, whatever it says."""
        return self.progress


class Frozen(Exception):
    """A process has not answered for resources.collective_timeout_s."""


class Pulse:
    """Asks an actor, while something waits for it, whether its process answers."""

    def __init__(
        self,
        actor: Any,
        who: str,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """who: the process, such as "worker 1". limit_s: resources.collective_timeout_s. on_progress: called with the actor's
        progress."""
        self._actor, self._who, self._limit_s, self._clock, self._on_progress = actor, who, limit_s, clock, on_progress
        self._asked: Any = None
        self._answered = clock()
        self._said = False

    def wait(self, references: Sequence[Any]) -> Any:
        """The first of these references whose value, or whose error, is there. Raises Frozen."""
        import ray

        self._answered = self._clock()
        while not (ready := ray.wait(list(references), num_returns=1, timeout=min(LOOK_EVERY_S, self._limit_s / 4))[0]):
            self._look()
        return ready[0]

    def _look(self) -> None:
        import ray
        from ray.exceptions import RayError

        now = self._clock()
        if self._asked is None:
            self._asked = self._actor.pulse.options(concurrency_group=PULSE).remote()
        if ray.wait([self._asked], timeout=0)[0]:
            with suppress(RayError):  # the process has died, which the awaited call says
                if (progress := ray.get(self._asked)) is not None and self._on_progress is not None:
                    self._on_progress(*progress)
            self._asked, self._answered, self._said = None, now, False
            return
        silent_s = now - self._answered
        if silent_s > self._limit_s:
            self._asked, self._said = None, False
            raise Frozen(f"{self._what(silent_s)} (resources.collective_timeout_s={self._limit_s:g})")
        if silent_s > min(SAID_AFTER_S, self._limit_s / 2) and not self._said:
            self._said = True
            log.warning("%s; it is given up after %g s (resources.collective_timeout_s)", self._what(silent_s), self._limit_s)

    def _what(self, silent_s: float) -> str:
        from ray._private.state import actors

        node = actors(self._actor._actor_id.hex())["Address"]["IPAddress"] or "a node"
        return f"{self._who} on {node} has not answered for {silent_s:.0f} s: its process or its machine stands still"

"""Workers that died, stalled or wait for resources, and a line of text about each for the user.

Ray's full errors and the workers' stacks are in workers.log, in the output folder.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

WORKERS_LOG = "workers.log"
BEAT_S = 5.0
MAX_NAMED = 3
"""Maximum number of stalled workers that a line names."""
COLLECTIVES = ("torch/distributed/", "torch/autograd/graph.py")
"""Files in the stack of a worker that waits for the others: in a collective, or for gradients in a backward pass."""


@dataclass(frozen=True, kw_only=True)
class GroupEnded:
    """A group of workers ended before its run did."""

    details: str
    failure: int | None
    """Number of this failure, from 1, among those that count together. None: it does not count as one."""
    limit: int
    """Number of failures that are allowed among those."""

    @property
    def again(self) -> bool:
        """Another group is started."""
        return self.failure is None or self.failure <= self.limit


@dataclass(frozen=True, kw_only=True)
class WorkersLost(GroupEnded):
    """Workers failed, which ends the whole group. Failures within an hour count together."""

    how: Mapping[int, str]
    """Rank -> how the worker ended, as the predicate of a sentence."""


@dataclass(frozen=True, kw_only=True)
class WorkersNotStarted(GroupEnded):
    """A group had its resources, and ended before all its workers trained. Such groups in a row count together."""

    why: str


@dataclass(frozen=True, kw_only=True)
class WorkersWait:
    """The group has no place for its workers yet."""

    line: str | None
    """What it waits for. None: it has its resources now."""


@dataclass(frozen=True, kw_only=True)
class WorkerStalled:
    """A worker made no step for longer than train.stall_timeout_s."""

    rank: int
    step: int
    seconds: float
    where: str
    """The function that the worker is in, with file and line."""
    waits: bool
    """It waits for the other workers."""
    stack: str


def lost_line(lost: WorkersLost, hosts: Mapping[int, str], *, resumes_from: str, log: Path) -> str:
    """`worker 1 on 10.0.0.2 died (killed); starting again from step 20, failure 1 of 3 within an hour`"""
    died = {rank: how for rank, how in lost.how.items() if how.startswith("died")} or dict(list(lost.how.items())[:1])
    who = ", ".join(f"{name(rank, hosts)} {how}" for rank, how in sorted(died.items()))
    failure = "" if lost.failure is None else f", failure {lost.failure} of {lost.limit} within an hour"
    if not lost.again:
        return f"{who}; not started again{failure} ({log} has more)"
    return f"{who}; starting again from {resumes_from}{failure} ({log} has more)"


def not_started_line(failed: WorkersNotStarted, log: Path) -> str:
    """`the workers did not start: one on 10.0.0.2 died (killed); starting them again, failure 1 of 3 in a row`"""
    then = "starting them again" if failed.again else "not started again"
    failure = "" if failed.failure is None else f", failure {failed.failure} of {failed.limit} in a row"
    return f"the workers did not start: {failed.why}; {then}{failure} ({log} has more)"


def stalled_line(stalled: Sequence[WorkerStalled], hosts: Mapping[int, str], log: Path) -> str:
    """`no step for 300 s since step 7: worker 1 on 10.0.0.2 is in read (loader.py:12), and 7 others wait`

    stalled: one or more workers that stalled at about the same time. Those that the others wait for are named first.
    """
    ranked = sorted(stalled, key=lambda one: (one.waits, one.rank))
    busy = [one for one in ranked if not one.waits]
    named = busy[:MAX_NAMED] or ranked[:1]
    places = [f"{name(one.rank, hosts)} {'waits for the others' if one.waits else 'is'} in {one.where}" for one in named]
    more, waiting = len(busy[MAX_NAMED:]), len(ranked) - len(busy) - (0 if busy else 1)
    if more:
        places.append(f"{more} more of them elsewhere")
    if waiting:
        others = f"{waiting} other{'' if waiting == 1 else 's'}"
        places.append(f"{others} wait{'s' if waiting == 1 else ''}" if busy else f"so do{'es' if waiting == 1 else ''} {others}")
    who = places[0] if len(places) == 1 else f"{', '.join(places[:-1])}, and {places[-1]}"
    first = ranked[0]
    stacks = "its stack" if len(ranked) == 1 else "their stacks"
    return f"no step for {first.seconds:.0f} s since step {first.step}: {who} ({log} has {stacks})"


def silent_line(rank: int, seconds: float, hosts: Mapping[int, str]) -> str:
    return f"{name(rank, hosts)} has not answered for {seconds:.0f} s: its process or its machine stands still"


def name(rank: int, hosts: Mapping[int, str]) -> str:
    return f"worker {rank} on {hosts[rank]}" if rank in hosts else f"worker {rank}"


def waiting_line(workers: int, each: Mapping[str, float], free: Mapping[str, float], total: Mapping[str, float]) -> str | None:
    """`waiting for 2 more workers of 1 GPU; the cluster has 6 of 8 GPUs free`; None where all find a place."""
    short = [kind for kind, amount in each.items() if amount and free.get(kind, 0.0) + 1e-6 < amount * workers]
    if not short:
        return None
    kind = short[-1]  # the GPU if both are short
    amount, there = each[kind], free.get(kind, 0.0)
    missing = workers - int((there + 1e-6) // amount)
    of = f"{amount:g} {kind}{'' if amount == 1 else 's'}"
    more = "" if missing == workers else "more "
    return (
        f"waiting for {missing} {more}worker{'' if missing == 1 else 's'} of {of}; "
        f"the cluster has {there:g} of {total.get(kind, 0.0):g} {kind}s free"
    )


class Stalls:
    """Collects reports of stalled workers until all workers of the group have had time to report."""

    def __init__(self, stall_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._gather_s, self._clock = 2 * beat_s(stall_timeout_s), clock
        self._stalled: list[WorkerStalled] = []
        self._first = 0.0

    def add(self, stalled: WorkerStalled) -> None:
        if not self._stalled:
            self._first = self._clock()
        self._stalled.append(stalled)

    def take(self) -> Sequence[WorkerStalled]:
        """The stalled workers to report now; empty while more reports may follow."""
        if not self._stalled or self._clock() - self._first < self._gather_s:
            return ()
        stalled, self._stalled = self._stalled, []
        return stalled


def beat_s(stall_timeout_s: float) -> float:
    """Seconds between heartbeats. Workers that stall together report it within this time."""
    return min(BEAT_S, stall_timeout_s / 4)


class Heartbeat:
    """A thread beside a worker's training thread that sends heartbeats, and reports where training is if it stalls."""

    def __init__(
        self, rank: int, stall_timeout_s: float, beat: Callable[[int], None], report: Callable[[WorkerStalled], None]
    ) -> None:
        """Call it in the thread that trains. Its first step may take any time."""
        self._rank, self._limit_s, self._beat, self._report = rank, stall_timeout_s, beat, report
        self._thread = threading.get_ident()
        self._last: tuple[int, float] | None = None
        self._reported = False
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def stepped(self, step: int) -> None:
        self._last, self._reported = (step, time.monotonic()), False

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(beat_s(self._limit_s)):
            self._beat(self._rank)
            last = self._last
            if last is None or self._reported or (seconds := time.monotonic() - last[1]) < self._limit_s:
                continue
            frame = sys._current_frames().get(self._thread)
            if frame is not None:
                self._reported = True
                self._report(_stalled(self._rank, last[0], seconds, frame))


def _stalled(rank: int, step: int, seconds: float, frame: FrameType) -> WorkerStalled:
    stack = traceback.extract_stack(frame)
    last = stack[-1]
    waits = any(part in entry.filename for entry in stack[-8:] for part in COLLECTIVES)
    where = f"{last.name} ({Path(last.filename).name}:{last.lineno})"
    return WorkerStalled(rank=rank, step=step, seconds=seconds, where=where, waits=waits, stack="".join(stack.format()))

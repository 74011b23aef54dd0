"""Workers that died, stalled or wait for resources, and a line of text on each for the user.

Ray's full errors and the workers' stacks are in workers.log, in the output folder.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

WORKERS_LOG = "workers.log"
BEAT_S = 5.0
COLLECTIVES = ("torch/distributed/", "torch/autograd/graph.py")
"""Files in the stack of a worker that waits for the others: in a collective, or for gradients in a backward pass."""


@dataclass(frozen=True, kw_only=True)
class WorkersLost:
    """Workers failed, which ends the whole group."""

    how: Mapping[int, str]
    """Rank -> how the worker ended, as the predicate of a sentence."""
    details: str
    failure: int
    """Number of this failure in the run, from 1."""


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


def lost_line(lost: WorkersLost, hosts: Mapping[int, str], *, limit: int | None, resumes_from: int | None, log: Path) -> str:
    """`worker 1 on 10.0.0.2 died (killed); starting again from step 20, failure 1 of 3`

    limit: None for an elastic run, whose driver counts the failures once it knows whether a node is gone.
    """
    died = {rank: how for rank, how in lost.how.items() if how.startswith("died")} or dict(list(lost.how.items())[:1])
    who = ", ".join(f"{name(rank, hosts)} {how}" for rank, how in sorted(died.items()))
    if limit is not None and lost.failure > limit:
        return f"{who}; not started again, failure {lost.failure} of {limit} ({log} has more)"
    again = "from the beginning" if resumes_from is None else f"from step {resumes_from}"
    failure = "" if limit is None else f", failure {lost.failure} of {limit}"
    return f"{who}; starting again {again}{failure} ({log} has more)"


def stalled_line(stalled: WorkerStalled, hosts: Mapping[int, str], log: Path) -> str:
    does = "waits for the others" if stalled.waits else "is"
    place = f"{name(stalled.rank, hosts)} {does} in {stalled.where}"
    return f"no step for {stalled.seconds:.0f} s since step {stalled.step}: {place} ({log} has its stack)"


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
        while not self._ended.wait(min(BEAT_S, self._limit_s / 4)):
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

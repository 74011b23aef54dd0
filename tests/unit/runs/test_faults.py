"""What is said of workers that died, stand still or wait for a place."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from raytune_llm.runs.faults import (
    BEAT_S,
    Heartbeat,
    Stalls,
    WorkersLost,
    WorkerStalled,
    lost_line,
    silent_line,
    stalled_line,
    waiting_line,
)

HOSTS, LOG = {0: "10.0.0.1", 1: "10.0.0.2"}, Path("o/workers.log")


def test_a_worker_that_died_is_one_line():
    lost = WorkersLost(how={0: "lost the others (connection closed)", 1: "died (killed)"}, details="", failure=1, limit=3)
    assert lost_line(lost, HOSTS, resumes_from="step 20", log=LOG) == (
        "worker 1 on 10.0.0.2 died (killed); starting again from step 20, failure 1 of 3 within an hour (o/workers.log has more)"
    )
    first = WorkersLost(how={0: "failed (ValueError: x)"}, details="", failure=4, limit=3)
    assert lost_line(first, {}, resumes_from="the beginning", log=LOG) == (
        "worker 0 failed (ValueError: x); not started again, failure 4 of 3 within an hour (o/workers.log has more)"
    )
    taken = WorkersLost(how={1: "died (its node was taken away)"}, details="", failure=None, limit=0)
    assert lost_line(taken, HOSTS, resumes_from="step 20", log=LOG) == (
        "worker 1 on 10.0.0.2 died (its node was taken away); starting again from step 20 (o/workers.log has more)"
    )


def test_who_waits_says_for_what():
    each = {"CPU": 1.0, "GPU": 1.0}
    free, total = {"CPU": 64.0, "GPU": 6.0}, {"CPU": 64.0, "GPU": 8.0}
    assert waiting_line(8, each, free, total) == "waiting for 2 more workers of 1 GPU; the cluster has 6 of 8 GPUs free"
    assert waiting_line(6, each, free, total) is None
    no_cpus = waiting_line(1, {"CPU": 2.0, "GPU": 0.0}, {"CPU": 1.0}, {"CPU": 4.0})
    assert no_cpus == "waiting for 1 worker of 2 CPUs; the cluster has 1 of 4 CPUs free"


def test_a_worker_that_makes_no_step_tells_where_it_is():
    told: list[WorkerStalled] = []
    beats: list[int] = []

    def stand_still() -> None:
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            time.sleep(0.02)

    heartbeat = Heartbeat(1, 0.2, beats.append, told.append)
    time.sleep(0.5)
    assert not told, "the first step may take as long as it likes"
    heartbeat.stepped(7)
    stand_still()
    time.sleep(0.3)
    heartbeat.close()
    [stalled] = told
    assert (stalled.rank, stalled.step, stalled.waits) == (1, 7, False) and stalled.where.startswith(
        "stand_still (test_faults.py:"
    )
    assert "stand_still()" in stalled.stack and beats
    line = stalled_line([replace(stalled, seconds=0.3)], HOSTS, LOG)
    assert line.startswith("no step for 0 s since step 7: worker 1 on 10.0.0.2 is in stand_still") and "o/workers.log" in line
    assert (
        silent_line(1, 61.0, HOSTS) == "worker 1 on 10.0.0.2 has not answered for 61 s: its process or its machine stands still"
    )


def test_workers_that_stall_together_are_one_line():
    def stalled(rank: int, *, waits: bool) -> WorkerStalled:
        where = "all_reduce (c.py:1)" if waits else "read (loader.py:12)"
        return WorkerStalled(rank=rank, step=7, seconds=300.4, where=where, waits=waits, stack="")

    def line(*busy: int, world: int) -> str:
        said = stalled_line([stalled(rank, waits=rank not in busy) for rank in range(world)], {}, LOG)
        return said.removeprefix("no step for 300 s since step 7: ").removesuffix(" (o/workers.log has their stacks)")

    assert line(1, world=1024) == "worker 1 is in read (loader.py:12), and 1023 others wait"
    assert line(0, world=2) == "worker 0 is in read (loader.py:12), and 1 other waits"
    assert line(world=3) == "worker 0 waits for the others in all_reduce (c.py:1), and so do 2 others"
    assert line(*range(9), world=9).endswith("worker 2 is in read (loader.py:12), and 6 more of them elsewhere")
    assert line(*range(9), world=16).count("worker ") == 3


def test_stalled_workers_are_reported_together_once_all_had_the_time_to_say_so():
    now = [100.0]
    stalls = Stalls(300.0, clock=lambda: now[0])
    one = WorkerStalled(rank=0, step=7, seconds=300.4, where="f (f.py:1)", waits=False, stack="")
    assert not stalls.take()
    stalls.add(one)
    now[0] += BEAT_S
    stalls.add(replace(one, rank=1))
    assert not stalls.take(), "others may follow"
    now[0] += BEAT_S
    assert [stalled.rank for stalled in stalls.take()] == [0, 1] and not stalls.take()

"""What is said of workers that died, stand still or wait for a place."""

from __future__ import annotations

import time
from pathlib import Path

from raytune_llm.runs.faults import Heartbeat, WorkersLost, WorkerStalled, lost_line, silent_line, stalled_line, waiting_line

HOSTS, LOG = {0: "10.0.0.1", 1: "10.0.0.2"}, Path("o/workers.log")


def test_a_worker_that_died_is_one_line():
    lost = WorkersLost(how={0: "lost the others (connection closed)", 1: "died (killed)"}, details="", failure=1)
    assert lost_line(lost, HOSTS, limit=3, resumes_from=20, log=LOG) == (
        "worker 1 on 10.0.0.2 died (killed); starting again from step 20, failure 1 of 3 (o/workers.log has more)"
    )
    first = WorkersLost(how={0: "failed (ValueError: x)"}, details="", failure=4)
    assert lost_line(first, {}, limit=3, resumes_from=None, log=LOG) == (
        "worker 0 failed (ValueError: x); not started again, failure 4 of 3 (o/workers.log has more)"
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
    assert "time.sleep(0.02)" in stalled.stack and beats
    line = stalled_line(stalled, HOSTS, LOG)
    assert line.startswith("no step for 0 s since step 7: worker 1 on 10.0.0.2 is in stand_still") and "o/workers.log" in line
    assert (
        silent_line(1, 61.0, HOSTS) == "worker 1 on 10.0.0.2 has not answered for 61 s: its process or its machine stands still"
    )

"""Whether a group that failed is started again. The errors are Ray Train's; there is no Ray here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from raytune_llm.errors import ConfigError
from raytune_llm.runs import restarts
from raytune_llm.runs.faults import not_started_line
from raytune_llm.runs.group_trainer import Asked
from raytune_llm.runs.restarts import HOUR_S, START_FAILURES, Failures, Restarts

DIED = WorkerGroupError("", {1: ActorDiedError()})
NO_PLACE = ControllerError(WorkerGroupStartupTimeoutError(2))
NOT_STARTED = ControllerError(WorkerGroupStartupFailedError("a worker died as it began"))


class Run:
    """A run whose hours pass by hand."""

    def __init__(self, *, max_failures: int = 3, in_place: bool = True, nodes_gone: bool | None = None) -> None:
        self.now, self.nodes_gone = 0.0, nodes_gone
        self.lost: list[Any] = []
        self.counted: list[int] = []
        self.restarts = Restarts(
            failures=Failures(limit=max_failures, clock=lambda: self.now),
            in_place=in_place,
            node_lost=None if nodes_gone is None else lambda: bool(self.nodes_gone),
            on_lost=self.counted.append,
        )

    def again(self, error: Exception) -> bool:
        return self.restarts.again(error, self.lost.append)


def taken_away() -> Exception:
    """As Ray says of a worker whose node drained because it was reclaimed."""
    death = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    error = ActorDiedError(
        ActorDiedErrorContext(actor_id=b"0" * 16, error_message="The node was terminated", node_death_info=death)
    )
    assert error.preempted
    return WorkerGroupError("", {0: error, 1: RuntimeError("gloo: Connection closed by peer")})


def test_failures_are_counted_within_an_hour():
    run = Run(max_failures=2)
    assert run.again(DIED) and run.again(DIED)
    run.now = HOUR_S - 1
    assert not run.again(DIED), "the third within an hour"
    run.now = HOUR_S + 1
    assert run.again(DIED), "two of the three are longer ago"
    assert [lost.failure for lost in run.lost] == [1, 2, 3, 2]
    week = Run(max_failures=1)
    for hour in range(7 * 24):
        week.now = hour * (HOUR_S + 1)
        assert week.again(DIED)


def test_a_run_that_may_not_fail_is_not_started_again():
    run = Run(max_failures=0)
    assert not run.again(DIED) and not run.restarts.allowed
    assert [(lost.failure, lost.limit, lost.again) for lost in run.lost] == [(1, 0, False)]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_node_that_was_taken_away_is_no_failure(in_place: bool):
    run = Run(max_failures=0, in_place=in_place, nodes_gone=None if in_place else True)
    for _ in range(5):
        assert run.again(taken_away()) == in_place, "an elastic run ends its group and takes what is left"
        assert run.restarts.allowed and "does not count" in run.restarts.why
    assert all(lost.again and lost.failure is None for lost in run.lost)
    assert run.lost[0].how[0] == "died (its node was taken away)"
    assert run.counted == [1, 2, 3, 4, 5], "the metric has all of them"


def test_an_elastic_run_counts_workers_whose_nodes_live(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(restarts, "SECOND_LOOK_S", 0.0)
    run = Run(max_failures=1, in_place=False, nodes_gone=True)
    assert not run.again(DIED) and run.restarts.why == "a node is gone, which does not count as a failure"
    run.nodes_gone = False
    assert not run.again(DIED) and run.restarts.allowed and run.restarts.why == "failure 1 of 1 within an hour"
    assert not run.again(DIED) and not run.restarts.allowed
    assert run.counted == [1, 2, 3]


def test_a_node_is_looked_at_again_as_it_may_answer_while_it_dies(monkeypatch: pytest.MonkeyPatch):
    run = Run(max_failures=0, in_place=False, nodes_gone=False)

    def dies(seconds: float) -> None:
        run.nodes_gone = True

    monkeypatch.setattr(restarts.time, "sleep", dies)
    run.again(DIED)
    assert run.restarts.allowed


def test_a_group_waits_for_its_place_as_long_as_it_takes():
    run = Run(max_failures=0)
    assert all(run.again(NO_PLACE) for _ in range(100))
    assert not run.lost


def test_a_worker_that_died_as_it_started_is_told_with_its_node():
    run = Run()
    failed = died_at_start(WorkerGroupStartupFailedError("One of the worker actors failed to initialize due to error:"))
    assert run.again(failed)
    log = Path("workers.log")
    said = "the workers did not start: one on 10.0.0.2 died (killed)"
    assert not_started_line(run.lost[-1], log) == f"{said}; starting them again, failure 1 of 3 in a row (workers.log has more)"
    while run.again(failed):
        pass
    assert not_started_line(run.lost[-1], log) == f"{said}; not started again, failure 4 of 3 in a row (workers.log has more)"


@pytest.mark.parametrize("as_it_is_made", [False, True])
def test_what_a_worker_raised_as_it_started_is_told_with_its_node(as_it_is_made: bool):
    stack = "Traceback (most recent call last):\n  x.py\ntorch.distributed.DistStoreError: Timed out. 1/2 clients joined."
    raised = RayTaskError("Worker.execute", stack, TimeoutError(), proctitle="ray::Worker", pid=7, ip="10.0.0.2")
    run, failed = Run(), WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    failed.__cause__ = ActorDiedError(raised)
    assert run.again(ControllerError(failed if as_it_is_made else raised.as_instanceof_cause()))
    assert run.lost[-1].why == "one on 10.0.0.2 failed (torch.distributed.DistStoreError: Timed out. 1/2 clients joined.)"
    assert "x.py" in run.lost[-1].details


def test_a_node_that_goes_each_time_a_group_starts_does_not_end_an_elastic_run(monkeypatch):
    monkeypatch.setattr(restarts, "SECOND_LOOK_S", 0.0)
    run = Run(in_place=False, nodes_gone=True)
    failed = died_at_start(WorkerGroupStartupFailedError(""))
    for _ in range(2 * START_FAILURES):
        run.again(failed)
        assert run.restarts.allowed
    assert not_started_line(run.lost[-1], Path("w")).endswith("one on 10.0.0.2 died (killed); starting them again (w has more)")
    run.nodes_gone = False
    for _ in range(2 * START_FAILURES):
        run.again(failed)
        assert run.restarts.allowed
        run.restarts.worked()  # the next group trained until it was asked to save and end


def died_at_start(failed: WorkerGroupStartupFailedError) -> ControllerError:
    failed.__cause__ = ActorDiedError(
        ActorDiedErrorContext(actor_id=b"0" * 16, class_name="Worker", node_ip_address="10.0.0.2", pid=7, error_message="exited")
    )
    return ControllerError(failed)


def test_a_group_that_does_not_start_is_given_up_unless_one_did_in_between():
    run = Run()
    assert all(run.again(NOT_STARTED) for _ in range(START_FAILURES)) and not run.again(NOT_STARTED)
    run = Run()
    for _ in range(3):
        assert run.again(NOT_STARTED)
        assert run.again(DIED)
    assert all(run.again(ControllerError(RuntimeError("gloo connectFullMesh failed"))) for _ in range(START_FAILURES))


def test_what_the_user_has_to_fix_ends_the_run_at_once():
    run = Run()
    assert not run.again(WorkerGroupError("", {0: ConfigError("train.x", "must be y"), 1: ActorDiedError()}))
    assert not run.lost and not run.restarts.allowed


def test_another_group_is_no_consequence_of_what_ended_outside_the_controller():
    run = Run(in_place=False, nodes_gone=True)
    run.again(DIED)
    run.restarts.begin()
    assert not run.restarts.allowed


def test_ray_asks():
    assert Asked(lambda error: True).make_decision(DIED) is FailureDecision.RETRY
    assert Asked(lambda error: False).make_decision(DIED) is FailureDecision.RAISE

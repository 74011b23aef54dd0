"""Decides whether a failed group is started again: a number of failures is allowed within an hour. [ray]"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from raytune_llm.errors import UserError
from raytune_llm.runs.faults import WorkersLost, WorkersNotStarted
from raytune_llm.runs.ray_failures import how_it_ended, preempted, why_not_started

HOUR_S = 3600.0
START_FAILURES = 3
"""A run ends if more groups in a row than this could not start."""
SECOND_LOOK_S = 1.0
"""Wait before a node is checked again: a dying node may still answer for a moment."""


@dataclass(kw_only=True)
class Failures:
    """A run's failures of the last hour."""

    limit: int
    clock: Callable[[], float] = time.monotonic
    _times: list[float] = field(default_factory=list, init=False)

    def add(self) -> int:
        """Count a failure. Returns the number within the last hour; more than `limit` are too many."""
        now = self.clock()
        self._times = [at for at in self._times if now - at < HOUR_S] + [now]
        return len(self._times)


@dataclass(kw_only=True)
class Restarts:
    """Decides on the restarts of a run's groups. Called by a group's controller, in a thread of this process."""

    failures: Failures
    in_place: bool
    """Ray starts the group again with the same size. If not, the group ends, and the driver starts another one."""
    node_lost: Callable[[], bool] | None = None
    """Tells whether a node of the group is gone, if that does not count as a failure. None: it does."""
    on_lost: Callable[[int], None] = lambda losses: None
    """Called with the number of groups that lost workers, whether these count as failures or not."""
    allowed: bool = field(default=False, init=False)
    """Whether the run may start another group, by the last decision."""
    why: str = field(default="", init=False)
    """The last failure."""
    _losses: int = field(default=0, init=False)
    _not_started: int = field(default=0, init=False)

    def begin(self) -> None:
        """Called when a new group begins. If it ends without a decision, no other group follows."""
        self.allowed, self.why = False, ""

    def worked(self) -> None:
        """Called when a group has ended as it should."""
        self._not_started = 0

    def again(self, error: Exception, send: Callable[[WorkersLost | WorkersNotStarted], None]) -> bool:
        """Whether Ray should start the group again after an error of Ray Train. send: called with the lost workers."""
        workers = getattr(error, "worker_failures", None)
        self.allowed = self._starts_again(error, send) if workers is None else self._works_again(workers, send)
        return self.allowed and self.in_place

    def _starts_again(self, error: Exception, send: Callable[[WorkersNotStarted], None]) -> bool:
        """The decision after a group that could not start. If it found no resources, it may wait without limit."""
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

        reason = getattr(error, "controller_failure", error)
        why = why_not_started(reason)
        self.why = f"the workers did not start ({why})"
        if isinstance(reason, WorkerGroupStartupTimeoutError):
            return True
        failure = None
        if not (preempted(reason.__cause__ or reason) or self._node_is_lost()):
            self._not_started += 1
            failure = self._not_started
        details = "\n".join(str(one) for one in (reason, reason.__cause__) if one is not None)
        failed = WorkersNotStarted(why=why, details=details, failure=failure, limit=START_FAILURES)
        send(failed)
        return failed.again

    def _works_again(self, workers: dict[int, Exception], send: Callable[[WorkersLost], None]) -> bool:
        """The decision after workers failed. workers: rank -> error."""
        self._not_started = 0
        if any(isinstance(error, UserError) for error in workers.values()):
            return False  # an error that the user has to fix, which the worker has sent; it would only occur again
        self._losses += 1
        self.on_lost(self._losses)
        failure, limit = None, self.failures.limit
        if any(preempted(error) for error in workers.values()):
            self.why = "a node was taken away, which does not count as a failure"
        elif self._node_is_lost():
            self.why = "a node is gone, which does not count as a failure"
        else:
            failure = self.failures.add()
            self.why = f"failure {failure} of {limit} within an hour"
        how = {rank: how_it_ended(error) for rank, error in workers.items()}
        details = "\n".join(f"worker {rank}: {error}" for rank, error in workers.items())
        lost = WorkersLost(how=how, details=details, failure=failure, limit=limit)
        send(lost)
        return lost.again

    def _node_is_lost(self) -> bool:
        if self.node_lost is None:
            return False
        if not (lost := self.node_lost()):
            time.sleep(SECOND_LOOK_S)
            lost = self.node_lost()
        return lost

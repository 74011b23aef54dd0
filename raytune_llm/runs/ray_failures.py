"""What Ray's exceptions mean to the user: how a worker ended, and why a run on Ray failed. [ray]"""

from __future__ import annotations

import re

from raytune_llm.errors import ResourceError, RunLost, UserError, first_line, last_line

SOURCE = re.compile(r"^\[\S+:\d+\] ")
"""The C++ file and line at the start of gloo's messages."""
NODE = re.compile(r"^\s*ip: (\S+)|^.*\(pid=\d+, ip=([^,)]+)", re.MULTILINE)
"""The address of a dead actor's node, or of a task's that failed, in Ray's message."""


def how_it_ended(error: Exception) -> str:
    """How a worker ended, as the predicate of a sentence."""
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    if preempted(error):
        return "died (its node was taken away)"
    error = getattr(error, "health_check_failure", error)
    text = str(error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "died (it did not answer, and was killed)"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return "died (the machine ran out of memory)"
    if isinstance(error, RayActorError):
        return "died (its node is gone)" if "node has died" in text or "node was terminated" in text else "died (killed)"
    first = (text.strip().splitlines() or [""])[0]
    if any(word in text for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")):
        return f"lost the others ({SOURCE.sub('', first).split('. ')[0][:120]})"
    return f"failed ({type(error).__name__}: {first[:200]})"


def preempted(error: BaseException) -> bool:
    """Whether a worker was lost because its node was preempted, which does not count as a failure."""
    from ray.exceptions import RayActorError

    error = getattr(error, "health_check_failure", error)
    return isinstance(error, RayActorError) and error.preempted


def why_not_started(error: BaseException) -> str:
    """Why the workers of a group did not start, as a clause."""
    from ray.exceptions import RayActorError, RayTaskError

    reason = error.__cause__ or error  # Ray Train's errors say what it did; the reason is the one that they were raised from
    if not isinstance(reason, RayActorError | RayTaskError):
        return first_line(reason)
    raised = isinstance(reason, RayTaskError) or reason.actor_init_failed
    how = f"failed ({last_line(reason)[:200]})" if raised else how_it_ended(reason)
    node = NODE.search(str(reason))
    return f"one{f' on {node[1] or node[2]}' if node else ''} {how}"


def cause(error: BaseException, last_loss: str) -> BaseException:
    """The error to raise for an error of Ray Train: the worker's own, or a ResourceError that explains it.

    last_loss: the last notice about lost workers. An error that is a bug of this package is returned as it is.
    """
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
    from ray.train import ControllerError

    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        raised = getattr(failure, "cause", failure)
        if isinstance(raised, UserError):
            return raised
    if any(isinstance(failure, OutOfMemoryError) for failure in (error, *failures.values())):
        return ResourceError("a worker ran out of memory", "Lower train.micro_batch_size or data.max_length.")
    if isinstance(error, ControllerError):
        return RunLost(
            f"the workers did not start: {why_not_started(error.controller_failure)}",
            "Look whether the machines are busy or gone; the same command resumes.",
        )
    if " died (" in last_loss or " lost the others (" in last_loss:
        return RunLost(
            last_loss, "The same command resumes from the newest checkpoint; resources.max_failures allows more within an hour."
        )
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return ray_lost(error)
    return error


def ray_lost(error: BaseException) -> RunLost:
    """The error for a Ray cluster that does not answer any more."""
    return RunLost(
        f"Ray lost the run ({first_line(error)})", "The same command resumes from the newest checkpoint, once Ray is back."
    )

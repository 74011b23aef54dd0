"""Calls a function on a node of the cluster, with the resources of a training worker. [ray]"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from raytune_llm.config.resources import Cluster, Local
from raytune_llm.errors import ResourceError, RunLost, first_line
from raytune_llm.runs.group_size import ROOM_AFTER_S, group_size, warn_without_room
from raytune_llm.runs.pulse import PULSE_GROUP, Beating, Frozen, Pulse

T = TypeVar("T")
log = logging.getLogger(__name__)


def call_counted(
    resources: Local | Cluster, function: Callable[[Callable[[int, int], None]], T], on_progress: Callable[[int, int], object]
) -> T:
    """`call_on_node` with a function that tells how much of its work is done, and of how much: by the argument that it is called
    with. on_progress is called with that, in this process."""
    return call_with(group_size(resources).each, resources, function, on_progress=on_progress)


def call_on_node(resources: Local | Cluster, function: Callable[[], T], *, packages: Sequence[str] = ()) -> T:
    """The result of `function`, which must be picklable. Its errors are raised here, and RunLost if its process dies again
    and again, or stands still.

    packages: requirements that Ray installs on the node, in a runtime environment for this call.
    """
    return call_with(group_size(resources).each, resources, function, packages=packages)


def call_with(
    each: Mapping[str, float],
    resources: Local | Cluster,
    function: Callable[..., T],
    *,
    packages: Sequence[str] = (),
    on_progress: Callable[[int, int], object] | None = None,
) -> T:
    """`call_on_node`, with these CPUs and GPUs. A process that dies is replaced as often as max_failures says."""
    import ray
    from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

    options: dict[str, Any] = {"num_cpus": each["CPU"], "num_gpus": each["GPU"], "concurrency_groups": PULSE_GROUP}
    options |= {"max_restarts": resources.max_failures, "max_task_retries": resources.max_failures}
    if packages:
        options["runtime_env"] = {"pip": list(packages)}
    actor: Any = ray.remote(**options)(Caller).remote()
    try:
        wait_for_places([actor], each, packages)
        pulse = Pulse(actor, "a process", resources.collective_timeout_s, on_progress=on_progress)
        return ray.get(pulse.wait([actor.call.remote(function, on_progress is not None)]))
    except RayTaskError as error:
        raise error.cause from None
    except RuntimeEnvSetupError as error:
        what = f"the packages {', '.join(packages)} can't be installed on a node of the cluster ({first_line(error)})"
        raise ResourceError(what, "Make the nodes reach a package index, or install them in an environment there.") from error
    except RayError as error:
        what = f"a process on a node of the cluster died, or its node is gone ({first_line(error)})"
        raise RunLost(what, "The same command resumes.") from error
    except Frozen as frozen:
        raise RunLost(str(frozen), "The same command resumes; take a machine that stands still out of the cluster.") from None
    finally:
        ray.kill(actor)


def wait_for_places(actors: Sequence[Any], each: Mapping[str, float], packages: Sequence[str] = ()) -> None:
    """Wait until these actors have started, and log what they wait for."""
    import ray

    starting = [actor.__ray_ready__.remote() for actor in actors]
    if packages and ray.wait(starting, num_returns=len(starting), timeout=ROOM_AFTER_S)[1]:
        log.warning("waiting for a node of the cluster to install %s", ", ".join(packages))
    while starting := ray.wait(starting, num_returns=len(starting), timeout=ROOM_AFTER_S)[1]:
        warn_without_room(len(starting), each)


class Caller(Beating):
    """An actor for one call."""

    def call(self, function: Callable[..., T], counted: bool) -> T:
        return function(self._tell) if counted else function()

    def _tell(self, done: int, total: int) -> None:
        self.progress = done, total

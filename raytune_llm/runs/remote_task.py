"""One call on a node of the cluster, with the resources of a training worker. [ray]"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from raytune_llm.config.resources import Cluster
from raytune_llm.errors import ResourceError, first_line
from raytune_llm.runs.group_size import group_size

T = TypeVar("T")


def call_on_node(resources: Cluster, function: Callable[[], T]) -> T:
    """The result of `function`, which is pickled. What it raises is raised here; ResourceError if its process dies."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

    size = group_size(resources)
    try:
        return ray.get(ray.remote(num_cpus=size.cpus, num_gpus=size.gpus)(function).remote())
    except RayTaskError as error:
        raise error.cause from None
    except (OutOfMemoryError, WorkerCrashedError) as error:
        what = f"a process on a node of the cluster died ({first_line(error)})"
        raise ResourceError(what, "The same command resumes.") from error

"""Calls a function on a node of the cluster, with the resources of a training worker. [ray]"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from raytune_llm.config.resources import Cluster, Local
from raytune_llm.errors import ResourceError, first_line
from raytune_llm.runs.group_size import group_size

T = TypeVar("T")


def call_on_node(resources: Local | Cluster, function: Callable[[], T], *, packages: Sequence[str] = ()) -> T:
    """The result of `function`, which must be picklable. Its errors are raised here, and ResourceError if its process dies.

    packages: requirements that Ray installs on the node, in a runtime environment for this call.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

    size = group_size(resources)
    options: dict[str, Any] = {"num_cpus": size.cpus, "num_gpus": size.gpus}
    if packages:
        options["runtime_env"] = {"pip": list(packages)}
    try:
        return ray.get(ray.remote(**options)(_called).remote(function))
    except RayTaskError as error:
        raise error.cause from None
    except RuntimeEnvSetupError as error:
        what = f"the packages {', '.join(packages)} can't be installed on a node of the cluster ({first_line(error)})"
        raise ResourceError(what, "Make the nodes reach a package index, or install them in an environment there.") from error
    except RayError as error:
        what = f"a process on a node of the cluster died, or its node is gone ({first_line(error)})"
        raise ResourceError(what, "The same command resumes.") from error


def _called(function: Callable[[], T]) -> T:
    """Call the function. Ray accepts only plain functions, and `function` may be a partial."""
    return function()

"""Functions called on a node of the cluster that the caller chooses, and their results. [ray]"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raytune_llm.errors import ResourceError, RunLost, first_line, last_line

ANSWER_TIMEOUT_S = 60.0


def on_node(node: str, function: Callable[..., Any]) -> Any:
    import ray

    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=at_node(node))


def at_node(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def answers(asked: Sequence[Any], what: str) -> list[Any]:
    """The results of remote calls. Raises ResourceError if a call fails or takes too long, and RunLost if a node is lost. what:
    the task, such as "report their properties"."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        return ray.get(list(asked), timeout=ANSWER_TIMEOUT_S)
    except GetTimeoutError:
        raise ResourceError(
            f"nodes of the cluster did not {what} within {ANSWER_TIMEOUT_S:g} s", "See `ray status` for nodes that are lost."
        ) from None
    except RayTaskError as error:
        raise ResourceError(
            f"a node of the cluster can't {what} ({last_line(error)})",
            "Give all nodes the same image or environment as the driver.",
        ) from None
    except RayError as error:
        raise RunLost(
            f"a node of the cluster was lost before it could {what} ({first_line(error)})",
            "See `ray status`; the same command tries again.",
        ) from None

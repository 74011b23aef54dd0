"""Finds the cluster's nodes that can take workers now: they answer and are not draining. [ray]"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

ANSWERS_WITHIN_S = 2.0
LOOK_EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class LiveNode:
    total: Mapping[str, float]
    free: Mapping[str, float]


def nodes_there() -> list[LiveNode]:
    """The nodes that can take workers. Ray also lists lost nodes for some seconds, and draining ones until they are gone."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [LiveNode(total=node["Resources"], free=free[node["NodeID"]]) for node in _alive() if node["NodeID"] in free]


def node_ids() -> set[str]:
    return {node["NodeID"] for node in _alive()}


def draining_ids() -> Set[str]:
    """Ids of nodes that are about to end: a spot instance that is reclaimed, a pod that is deleted."""
    import ray._private.state

    return ray._private.state.state.get_draining_nodes().keys()


def summed(resources: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in resources:
        for kind, amount in one.items():
            total[kind] = total.get(kind, 0.0) + amount
    return total


def _alive() -> list[Mapping[str, Any]]:
    import ray

    leaving = draining_ids()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving and _answers(node)]


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWERS_WITHIN_S).close()
    except OSError:
        return False
    return True


@dataclass(kw_only=True)
class Leaving:
    """Tells whether a node of a group drains. It must be called often."""

    nodes_of_group: Callable[[], Set[str]]
    look: Callable[[], Set[str]] = draining_ids
    clock: Callable[[], float] = time.monotonic
    _looked: float = field(default=float("-inf"), init=False)

    def __call__(self) -> bool:
        now = self.clock()
        if now - self._looked < LOOK_EVERY_S:
            return False
        self._looked = now
        return bool(self.look() & self.nodes_of_group())

"""Ranks the replicas for a request by which adapters they have loaded and how busy they are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """The load and adapters of a replica, as known to a router."""

    rows: int
    """Requests that the replica computes concurrently; further ones wait."""
    requests: int = 0
    """Requests that the replica has now, running or waiting."""
    resident: Set[str] = frozenset()
    """Adapters in the slots of its device."""
    slots: int = 0
    held: Set[str] | None = None
    """Adapters that the replica can serve. None: it has not reported them yet."""

    @property
    def has_room(self) -> bool:
        return self.requests < self.rows

    def holds(self, adapter: str) -> bool:
        return self.held is None or adapter in self.held


def rank_replicas(adapter: str | None, loads: Mapping[Key, ReplicaLoad]) -> list[Key]:
    """Keys of the replicas, best first; ties keep the given order.

    A request for the base model goes to the replica with the fewest requests. A request for an adapter prefers replicas that have
    the adapter on the device and a free row, then those with a free slot and a free row, then any that can load the adapter, and
    last those that don't know it yet (they ask their peers for it). Within each group, fewer requests are better.
    """

    def rank(load: ReplicaLoad) -> int:
        if adapter is None:
            return 0
        if not load.holds(adapter):
            return 3
        if load.has_room and adapter in load.resident:
            return 0
        return 1 if load.has_room and len(load.resident) < load.slots else 2

    return sorted(loads, key=lambda key: (rank(loads[key]), loads[key].requests))

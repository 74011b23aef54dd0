"""Which replica a request goes to: one that holds its adapter, and is not busier than it must be."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A replica, as far as a router knows it."""

    rows: int
    """Requests that it answers at once; more of them wait."""
    requests: int = 0
    """That it answers or lets wait now."""
    resident: Set[str] = frozenset()
    """Adapters in slots of its device."""
    slots: int = 0
    held: Set[str] | None = None
    """Adapters that it can be asked for; None: it has not said so yet."""

    @property
    def has_room(self) -> bool:
        return self.requests < self.rows

    def holds(self, adapter: str) -> bool:
        return self.held is None or adapter in self.held


def ordered(adapter: str | None, places: Mapping[Key, Place]) -> list[Key]:
    """Replicas in the order in which they are to be asked; of equals, in the order given.

    A request for the base goes where the fewest are. One for an adapter goes where the adapter is on the device and a row is
    free, then where a slot and a row are free, then to any that can load it, and last to those that have not heard of it (they
    look for it); among equals, the replica with the fewest requests comes first.
    """

    def rank(place: Place) -> int:
        if adapter is None:
            return 0
        if not place.holds(adapter):
            return 3
        if place.has_room and adapter in place.resident:
            return 0
        return 1 if place.has_room and len(place.resident) < place.slots else 2

    return sorted(places, key=lambda key: (rank(places[key]), places[key].requests))

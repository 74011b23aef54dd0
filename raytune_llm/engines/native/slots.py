"""The slots of adapters on the device.

A name refers to a version, which is immutable and identified by the digest of its files. Rows refer to versions, since a name may
get another version or be removed while they run. A version in use keeps its slot. If another version needs a slot, the least
recently used one that is neither in use nor pinned is evicted. Its weights stay in host memory, so loading it again is one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(eq=False)
class Adapter:
    """One version of an adapter."""

    name: str
    version: str
    rank: int
    folder: Path
    weights: Any
    """The weights in the bank's form; None while they are only on disk."""
    failure: Exception | None = None
    """Why they could not be read again."""
    pinned: bool = False
    users: int = 0
    """The number of rows and passes that run with it."""
    slot: int | None = None


class Bank(Protocol):
    """The slots of adapters in the layers, on the device (models/adapters/)."""

    @property
    def num_slots(self) -> int: ...

    def load(self, slot: int, weights: Any) -> None:
        """To be called between two steps."""
        ...

    def clear(self, slot: int) -> None: ...


@dataclass(eq=False)
class Slots:
    """Which version is in which slot. Not thread-safe: the engine's loop owns it."""

    bank: Bank
    loads: int = 0
    evictions: int = 0
    _resident: dict[int, Adapter] = field(default_factory=dict)
    """Least recently used first."""

    def take(self, adapter: Adapter) -> int | None:
        """A slot with this version for one more row; None if all slots are in use or pinned, or its weights are only on disk."""
        if adapter.slot is None:
            weights = adapter.weights  # read once, since another thread may drop them from host memory
            slot = None if weights is None else self._free_slot()
            if slot is None:
                return None
            self.bank.load(slot, weights)
            self.loads += 1
            adapter.slot = slot
        self._resident.pop(adapter.slot, None)
        self._resident[adapter.slot] = adapter
        adapter.users += 1
        return adapter.slot

    def give_back(self, adapter: Adapter) -> None:
        """Release it for one row."""
        adapter.users -= 1
        assert adapter.users >= 0, adapter.name

    def forget(self, adapter: Adapter) -> None:
        """Free the version's slot once no row uses it; no new row will."""
        adapter.pinned = False
        if adapter.slot is not None and not adapter.users:
            self._evict(adapter)
        elif adapter.slot is not None:
            # The first to be evicted when its rows are done.
            self._resident = {adapter.slot: self._resident.pop(adapter.slot), **self._resident}

    def resident(self) -> Mapping[int, Adapter]:
        return self._resident

    def _free_slot(self) -> int | None:
        for slot in range(self.bank.num_slots):
            if slot not in self._resident:
                return slot
        idle = next((adapter for adapter in self._resident.values() if not adapter.users and not adapter.pinned), None)
        if idle is None:
            return None
        slot = idle.slot
        self._evict(idle)
        self.evictions += 1
        return slot

    def _evict(self, adapter: Adapter) -> None:
        assert adapter.slot is not None and not adapter.users, adapter.name
        self.bank.clear(adapter.slot)
        del self._resident[adapter.slot]
        adapter.slot = None

"""The changes of adapters since the server started, which bring all replicas to the same state, including later ones.

Every replica has a ledger. A change is broadcast to all replicas, and a new replica asks the others for their ledgers. Of two
changes of one adapter the later one wins, in whatever order they arrive (a last-writer-wins map), so that no coordinator is
needed, and the ledger exists as long as any replica does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from raytune_llm.errors import ConfigError, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChange:
    at: int
    """Nanoseconds since 1970 by the clock of the ingress that made the change; later than the change that it replaces."""
    name: str
    """The adapter's name."""
    what: Literal["folder", "pinned"]
    folder: str | None = None
    """The folder that the adapter is loaded from. None: the adapter was removed."""
    pinned: bool = False
    """Whether it is pinned from then on."""
    replaced: str | None = None
    """The version that the adapter had before. None: there was none."""


class Ledger:
    """Not thread-safe: used only in the replica's event loop."""

    def __init__(self) -> None:
        self._changes: dict[tuple[str, str], AdapterChange] = {}

    def record(self, change: AdapterChange) -> None:
        """Keep the change unless a later one of the same adapter is known."""
        if self.unknown([change]):
            self._changes[change.name, change.what] = change

    def unknown(self, changes: Iterable[AdapterChange]) -> list[AdapterChange]:
        """The changes that are newer than those in this ledger, in the order in which they were made."""
        known = self._changes
        fresh = [one for one in changes if (before := known.get((one.name, one.what))) is None or before.at < one.at]
        return sorted(fresh, key=lambda one: one.at)

    def all(self) -> list[AdapterChange]:
        return sorted(self._changes.values(), key=lambda one: one.at)


class Changes:
    """Keeps a replica's adapters as its ledger has them: changes are applied one after another, and one that a later change of
    the same name has replaced is not applied, however late it arrives. The replica's event loop owns it."""

    def __init__(self, apply: Callable[[AdapterChange], Awaitable[str | None]]) -> None:
        """apply: applies a change and returns the version if an adapter was loaded."""
        self._apply = apply
        self._ledger = Ledger()
        self._applying = asyncio.Lock()

    def all(self) -> list[AdapterChange]:
        return self._ledger.all()

    async def make(self, change: AdapterChange) -> str | None:
        """Apply a change and record it. Returns the version if an adapter was loaded. Raises ConfigError for a change that a
        later one has replaced, and whatever applying it raises; then nothing is recorded."""
        async with self._applying:
            if change in self._ledger.all():  # it was received before
                return None
            if not self._ledger.unknown([change]):
                raise ConfigError("the adapter", "was changed meanwhile by a later request", got=change.name, fix="Ask again.")
            version = await self._apply(change)
            self._ledger.record(change)
            return version

    async def catch_up(
        self,
        changes: Iterable[AdapterChange],
        refused: Callable[[AdapterChange, UserError], None],
        watched: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        """Apply the changes that are newer than those in the ledger. `refused` is called for one that fails, which is not
        retried. watched: the version in which serve.watch serves a name, or None. A version that a change did not replace was
        written after it, and stays."""
        async with self._applying:
            for change in self._ledger.unknown(changes):
                self._ledger.record(change)
                if change.what == "folder" and watched(change.name) not in (None, change.replaced):
                    continue
                try:
                    await self._apply(change)
                except UserError as error:
                    refused(change, error)


def now_after(changes: Iterable[AdapterChange]) -> int:
    """A time for a change that replaces `changes`, even if the clocks of the ingresses differ."""
    return max([time.time_ns(), *(one.at + 1 for one in changes)])

"""What was changed while the server ran, so that every replica comes to hold the same, those that start later too.

Each replica keeps a ledger; a change is told to all of them, and a replica that starts asks the others for theirs. Of two
changes of one name, the later one holds, whatever the order in which they are heard of (a last-writer-wins map), so nobody has to
be asked who is right, and the ledger lives as long as any replica does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from raytune_llm.errors import ConfigError, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    at: int
    """Nanoseconds since 1970 by the clock of the one who asked for it; later than what it replaces."""
    name: str
    """Of an adapter."""
    what: Literal["folder", "pinned"]
    folder: str | None = None
    """Where it is loaded from; None: it was removed."""
    pinned: bool = False


class Ledger:
    """A replica's event loop owns it."""

    def __init__(self) -> None:
        self._changes: dict[tuple[str, str], Change] = {}

    def take(self, change: Change) -> None:
        """Keep it, unless a later one is known."""
        if self.news([change]):
            self._changes[change.name, change.what] = change

    def news(self, changes: Iterable[Change]) -> list[Change]:
        """Those that are not known here, nor replaced, in the order in which they were made."""
        known = self._changes
        fresh = [one for one in changes if (before := known.get((one.name, one.what))) is None or before.at < one.at]
        return sorted(fresh, key=lambda one: one.at)

    def all(self) -> list[Change]:
        return sorted(self._changes.values(), key=lambda one: one.at)


class Changes:
    """Keeps a replica's adapters as its ledger has them: changes are applied one after another, and one that a later change of
    the same name has replaced is not applied, however late it is heard of. The replica's event loop owns it."""

    def __init__(self, apply: Callable[[Change], Awaitable[str | None]]) -> None:
        """apply: makes a change, and gives the version of an adapter that was loaded."""
        self._apply = apply
        self._ledger = Ledger()
        self._applying = asyncio.Lock()

    def all(self) -> list[Change]:
        return self._ledger.all()

    async def make(self, change: Change) -> str | None:
        """Gives the version of an adapter that was loaded. Raises ConfigError for a change that was replaced, and what applying
        it raises; then it is as if it had never been asked for."""
        async with self._applying:
            if change in self._ledger.all():  # told twice
                return None
            if not self._ledger.news([change]):
                raise ConfigError("the adapter", "was changed meanwhile by a later request", got=change.name, fix="Ask again.")
            version = await self._apply(change)
            self._ledger.take(change)
            return version

    async def catch_up(self, changes: Iterable[Change], refused: Callable[[Change, UserError], None]) -> None:
        """Those that are news here. One that can't be made is told as `refused`, and not tried again."""
        async with self._applying:
            for change in self._ledger.news(changes):
                self._ledger.take(change)
                try:
                    await self._apply(change)
                except UserError as error:
                    refused(change, error)


def now_after(changes: Iterable[Change]) -> int:
    """A time for a change that replaces these, also where clocks differ."""
    return max([time.time_ns(), *(one.at + 1 for one in changes)])

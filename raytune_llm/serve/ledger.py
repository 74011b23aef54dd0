"""What was changed while the server ran, so that every replica comes to hold the same, those that start later too.

Each replica keeps a ledger; a change is told to all of them, and a replica that starts asks the others for theirs. Of two
changes of one name, the later one holds, whatever the order in which they are heard of (a last-writer-wins map), so nobody has to
be asked who is right, and the ledger lives as long as any replica does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


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


def now_after(changes: Iterable[Change]) -> int:
    """A time for a change that replaces these, also where clocks differ."""
    return max([time.time_ns(), *(one.at + 1 for one in changes)])

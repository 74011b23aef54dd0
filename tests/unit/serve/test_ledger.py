from __future__ import annotations

import asyncio
from itertools import permutations

import pytest

from raytune_llm.errors import ConfigError, DataError
from raytune_llm.serve.ledger import AdapterChange, Changes, Ledger, now_after

LOADED = AdapterChange(at=1, name="a", what="folder", folder="/one")
MOVED = AdapterChange(at=2, name="a", what="folder", folder="/two")
REMOVED = AdapterChange(at=3, name="a", what="folder")
PINNED = AdapterChange(at=4, name="a", what="pinned", pinned=True)


def test_the_latest_change_of_a_name_holds_in_whatever_order_they_come():
    for order in permutations([LOADED, MOVED, REMOVED, PINNED]):
        ledger = Ledger()
        for change in order:
            ledger.record(change)
        assert ledger.all() == [REMOVED, PINNED]


def test_news_are_what_is_not_known_and_not_replaced():
    ledger = Ledger()
    ledger.record(MOVED)
    other = AdapterChange(at=0, name="b", what="folder", folder="/b")
    assert ledger.unknown([LOADED, MOVED, REMOVED, other]) == [other, REMOVED]


def test_a_change_is_later_than_what_it_replaces_though_a_clock_is_ahead():
    ahead = AdapterChange(at=2**63, name="a", what="folder", folder="/one")
    assert now_after([ahead, LOADED]) == 2**63 + 1


class Adapters:
    """What changes do to an engine, each after a while."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}
        self.changes = Changes(self.apply)

    async def apply(self, change: AdapterChange) -> str | None:
        await asyncio.sleep(0.02 if change is LOADED else 0)
        if change.folder == "/bad":
            raise DataError("/bad", "doesn't fit")
        if change.folder is None:
            self.folders.pop(change.name, None)
        else:
            self.folders[change.name] = change.folder
        return change.folder


@pytest.mark.parametrize(
    "order", permutations([LOADED, MOVED, REMOVED]), ids=lambda order: "-".join(str(one.at) for one in order)
)
def test_a_change_that_arrives_late_does_not_undo_a_later_one(order):
    async def all_at_once() -> None:
        told = await asyncio.gather(*(adapters.changes.make(change) for change in order), return_exceptions=True)
        late = [change.at < max(one.at for one in order[: number + 1]) for number, change in enumerate(order)]
        assert [isinstance(one, ConfigError) for one in told] == late

    adapters = Adapters()
    asyncio.run(all_at_once())
    assert adapters.folders == {} and adapters.changes.all() == [REMOVED]


def test_what_peers_know_is_made_beside_what_is_told_in_its_order():
    async def both() -> None:
        await asyncio.gather(adapters.changes.make(LOADED), adapters.changes.catch_up([MOVED], refused=print))

    adapters = Adapters()
    asyncio.run(both())
    assert adapters.folders == {"a": "/two"}


def test_a_version_that_was_written_after_a_change_outlives_it_on_a_later_replica():
    unloaded = AdapterChange(at=5, name="a", what="folder", replaced="v1")
    for watched, served in (("v1", {}), ("v2", {"a": "/watched"}), (None, {})):
        adapters = Adapters()
        adapters.folders["a"] = "/watched"
        asyncio.run(adapters.changes.catch_up([unloaded], print, watched=lambda name, version=watched: version))
        assert adapters.folders == served and adapters.changes.all() == [unloaded]


def test_a_change_that_is_refused_is_as_if_nobody_had_asked():
    adapters, bad = Adapters(), AdapterChange(at=5, name="a", what="folder", folder="/bad")

    async def refused_then_older() -> None:
        with pytest.raises(DataError):
            await adapters.changes.make(bad)
        await adapters.changes.make(LOADED)

    asyncio.run(refused_then_older())
    assert adapters.folders == {"a": "/one"}

from __future__ import annotations

from itertools import permutations

from raytune_llm.serve.ledger import Change, Ledger, now_after

LOADED = Change(at=1, name="a", what="folder", folder="/one")
MOVED = Change(at=2, name="a", what="folder", folder="/two")
REMOVED = Change(at=3, name="a", what="folder")
PINNED = Change(at=4, name="a", what="pinned", pinned=True)


def test_the_latest_change_of_a_name_holds_in_whatever_order_they_come():
    for order in permutations([LOADED, MOVED, REMOVED, PINNED]):
        ledger = Ledger()
        for change in order:
            ledger.take(change)
        assert ledger.all() == [REMOVED, PINNED]


def test_news_are_what_is_not_known_and_not_replaced():
    ledger = Ledger()
    ledger.take(MOVED)
    other = Change(at=0, name="b", what="folder", folder="/b")
    assert ledger.news([LOADED, MOVED, REMOVED, other]) == [other, REMOVED]


def test_a_change_is_later_than_what_it_replaces_though_a_clock_is_ahead():
    ahead = Change(at=2**63, name="a", what="folder", folder="/one")
    assert now_after([ahead, LOADED]) == 2**63 + 1

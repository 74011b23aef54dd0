"""What takes long says so; what is quick says nothing."""

from __future__ import annotations

import time

import pytest

from raytune_llm.report.slow import notify_if_slow
from raytune_llm.report.updates import Notice


def test_what_is_quick_says_nothing():
    told: list[Notice] = []
    with notify_if_slow(told.append, "saving", first_after_s=5.0):
        pass
    assert told == []


def test_what_takes_long_says_what_it_is_and_how_far_it_is():
    told: list[Notice] = []
    with notify_if_slow(told.append, "gathering", first_after_s=0.05) as task:
        task.of(3, 4)
        time.sleep(0.3)
    assert [notice.text for notice in told] == ["gathering (3 of 4, 0 s)", "gathering: done in 0 s"]


def test_what_fails_is_not_done():
    told: list[Notice] = []
    with pytest.raises(OSError, match="full"):
        fail_slowly(told)
    assert [notice.text for notice in told] == ["writing (0 s)"]


def fail_slowly(told: list[Notice]) -> None:
    with notify_if_slow(told.append, "writing", first_after_s=0.05):
        time.sleep(0.2)
        raise OSError("full")

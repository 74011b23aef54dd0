"""What takes long says so; what is quick says nothing."""

from __future__ import annotations

import re
import threading

import pytest

from raytune_llm.report.slow import notify_if_slow
from raytune_llm.report.updates import Notice


def test_what_is_quick_says_nothing():
    told: list[Notice] = []
    with notify_if_slow(told.append, "saving", first_after_s=5.0):
        pass
    assert told == []


class Told:
    """Notices, whatever seconds they say."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.any = threading.Event()

    def __call__(self, notice: Notice) -> None:
        self.texts.append(re.sub(r"\d+ s", "_ s", notice.text))
        self.any.set()


def test_what_takes_long_says_what_it_is_and_how_far_it_is():
    told = Told()
    with notify_if_slow(told, "gathering", first_after_s=0.2) as task:
        task.of(3, 4)
        assert told.any.wait(60)
    assert told.texts == ["gathering (3 of 4, _ s)", "gathering: done in _ s"]


def test_what_fails_is_not_done():
    told = Told()
    with pytest.raises(OSError, match="full"):
        fail_slowly(told)
    assert told.texts == ["writing (_ s)"]


def fail_slowly(told: Told) -> None:
    with notify_if_slow(told, "writing", first_after_s=0.05):
        assert told.any.wait(60)
        raise OSError("full")

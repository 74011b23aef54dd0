from __future__ import annotations

import threading

import pytest

from raytune_llm.data.read_ahead import read_ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_everything_comes_in_order():
    assert list(read_ahead(lambda stopped: range(50), ahead=2, name="ahead")) == list(range(50))


def test_no_more_is_made_than_is_waited_for():
    made = []

    def endless(stopped):
        while True:
            made.append(len(made))
            yield made[-1]

    taken = read_ahead(endless, ahead=2, name="ahead")
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    taken.close()
    assert not threads()
    assert len(made) <= 3 + 2 + 1


def test_a_failure_comes_after_what_was_made_before_it():
    def failing(stopped):
        yield 1
        raise ValueError("gone")

    taken = read_ahead(failing, ahead=2, name="ahead")
    assert next(taken) == 1
    with pytest.raises(ValueError, match="gone"):
        next(taken)
    assert not threads()

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.data.mixture import mix, repeated, weights_of


def mixed(sizes, strategy, weights=None, seed=0):
    sources = np.repeat(np.arange(len(sizes)), sizes)
    return mix(np.arange(len(sources)), sources, strategy=strategy, weights=weights, rng=np.random.default_rng(seed)).tolist()


def test_sources_follow_one_another():
    assert mixed([2, 3], "concat") == [0, 1, 2, 3, 4]


def test_sources_take_turns_until_one_is_exhausted():
    assert mixed([2, 5], "interleave_under") == [0, 2, 1, 3]


def test_sources_take_turns_until_all_are_exhausted():
    assert mixed([2, 5], "interleave_over") == [0, 2, 1, 3, 0, 4, 1, 5, 0, 6]


def test_sources_take_turns_without_repeats():
    assert mixed([2, 5], "interleave_once") == [0, 2, 1, 3, 4, 5, 6]


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@given(sizes=sizes, seed=st.integers(0, 9), weighted=st.booleans())
def test_once_means_every_row_once(sizes, seed, weighted):
    weights = [1.0 + n for n in range(len(sizes))] if weighted else None
    assert sorted(mixed(sizes, "interleave_once", weights, seed)) == list(range(sum(sizes)))


@given(sizes=sizes, seed=st.integers(0, 9))
def test_over_loses_no_row_and_under_repeats_none(sizes, seed):
    weights = [1.0 + n for n in range(len(sizes))]
    assert set(mixed(sizes, "interleave_over", weights, seed)) == set(range(sum(sizes)))
    assert max(Counter(mixed(sizes, "interleave_under", weights, seed)).values()) == 1


def test_weights_are_the_shares_of_the_draws():
    drawn = np.array(mixed([4000, 4000], "interleave_under", [0.25, 0.75]))
    assert (drawn >= 4000).mean() == pytest.approx(0.75, abs=0.02)


def test_temperature_evens_shares_out():
    assert weights_of([900, 100], 1.0).tolist() == pytest.approx([0.9, 0.1])
    assert weights_of([900, 100], 1e9).tolist() == pytest.approx([0.5, 0.5])


@given(sizes=sizes, seed=st.integers(0, 9), data=st.data())
def test_each_source_is_there_as_often_as_its_epochs_say(sizes, seed, data):
    epochs = [data.draw(st.floats(0.1, 3)) for _ in sizes]
    sources = np.repeat(np.arange(len(sizes)), sizes)
    times = np.bincount(repeated(np.arange(len(sources)), sources, epochs, seed), minlength=len(sources))
    for source, asked in enumerate(epochs):
        mine = times[sources == source]
        assert set(mine) <= {int(asked), int(asked) + 1}
        assert mine.sum() == int(asked) * len(mine) + round((asked - int(asked)) * len(mine))

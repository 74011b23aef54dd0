from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.data.packing import plan, type_of_numbers

lengths_and_capacity = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=300), st.just(capacity))
)


@given(lengths_and_capacity)
def test_every_row_is_in_one_pack_and_no_pack_is_over_full(case):
    lengths, capacity = np.array(case[0], dtype=np.int32), case[1]
    packs = plan(lengths, capacity)
    assert sorted(packs.rows.tolist()) == list(range(len(lengths)))
    assert all(lengths[packs[pack]].sum() <= capacity for pack in range(len(packs)))


@given(lengths_and_capacity)
def test_the_plan_is_best_fit_decreasing(case):
    lengths, capacity = case
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    packs = plan(np.array(lengths, dtype=np.int32), capacity)
    used = [sum(lengths[row] for row in packs[pack]) for pack in range(len(packs))]
    assert sorted(capacity - tokens for tokens in used) == sorted(room)


def test_chat_like_lengths_fill_packs_to_over_98_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.8, 20_000), 1, 1024).astype(np.int32)
    packs = plan(lengths, 1024)
    assert lengths.sum() / (len(packs) * 1024) > 0.98


def test_no_rows_make_no_packs():
    assert len(plan(np.zeros(0, np.int32), 16)) == 0


def test_numbers_of_rows_have_a_type_that_holds_them():
    assert type_of_numbers(2**31 - 1) is np.int32
    assert type_of_numbers(2**31) is np.int64, "10^12 tokens are more rows"

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm.losses.reward import bradley_terry, centering, reward_metrics

CHOSEN, REJECTED = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)


@settings(deadline=None)
@given(shift=st.floats(-100, 100))
def test_scores_are_known_up_to_a_constant(shift):
    torch.testing.assert_close(bradley_terry(CHOSEN + shift, REJECTED + shift), bradley_terry(CHOSEN, REJECTED))


def test_equal_scores_cost_log_2_and_count_as_wrong():
    torch.testing.assert_close(bradley_terry(CHOSEN, CHOSEN), torch.full((3,), math.log(2), dtype=torch.float64))
    assert reward_metrics(CHOSEN, CHOSEN) == {"accuracy": (0, 3), "margin": (0, 3)}


def test_a_margin_asks_for_that_much_more():
    margin = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    torch.testing.assert_close(bradley_terry(CHOSEN, REJECTED, margin), bradley_terry(CHOSEN - margin, REJECTED))


def test_centering_is_zero_for_opposite_scores():
    assert torch.equal(centering(CHOSEN, -CHOSEN), torch.zeros(3, dtype=torch.float64))
    assert (centering(CHOSEN, REJECTED) >= 0).all()


def test_metrics_are_sums_and_counts():
    assert reward_metrics(CHOSEN, REJECTED) == {"accuracy": (1, 3), "margin": (-2.5, 3)}

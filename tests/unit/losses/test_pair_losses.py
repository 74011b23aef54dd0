from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm.losses.preference import (
    PREFERENCE_LOSSES,
    PairLogprobs,
    RunningMean,
    Term,
    preference_metrics,
    rewards,
    weighted_sum,
)
from raytune_llm.losses.tokens import split_sums

SETTINGS = {name: {"beta": 0.1} for name in PREFERENCE_LOSSES} | {
    "sft": {},
    "chosen_nll": {},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "exo_pair": {"beta": 0.1, "label_smoothing": 0.01},
    "f_alpha": {"beta": 0.1, "alpha": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.5},
}
PER_TOKEN = {"ipo", "sigmoid_norm", "sft", "chosen_nll", "odds_ratio", "orpo", "simpo"}
WITHOUT_REFERENCE = {"sft", "chosen_nll", "odds_ratio", "orpo", "simpo", "cpo"}
OVER_THE_BATCH = {"aot", "aot_unpaired", "aot_pair", "sft"}


def loss_of(name, pairs):
    return PREFERENCE_LOSSES[name](pairs, **SETTINGS[name])


@pytest.fixture
def pairs():
    draw = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c, r, c_ref, r_ref = -20 * draw - 1
    return PairLogprobs(c, r, c_ref, r_ref, torch.tensor([3, 9, 5, 2, 7]), torch.tensor([8, 4, 5, 6, 1]))


def at_reference(pairs):
    return replace(pairs, chosen_P=pairs.reference_chosen_P, rejected_P=pairs.reference_rejected_P)


def part(pairs, indices):
    fields = {name: getattr(pairs, name)[indices] for name in PairLogprobs.__slots__ if name.endswith("_P")}
    return replace(pairs, **fields)


def test_where_policy_equals_reference_dpo_is_log_2_and_margins_are_zero(pairs):
    pairs = at_reference(pairs)
    torch.testing.assert_close(loss_of("sigmoid", pairs), torch.full((5,), math.log(2), dtype=torch.float64))
    metrics = preference_metrics(pairs, *rewards(pairs, beta=0.1))
    assert metrics["rewards/margins"][0] == 0
    assert metrics["rewards/accuracies"] == (0, 5)


def test_where_policy_equals_reference_length_desensitised_margins_are_zero_too():
    document, shared = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 2])
    head, tail = split_sums(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]), document, shared)
    chosen, rejected = (head + 0.5 * tail)[:, None]
    pairs = PairLogprobs(chosen, rejected, chosen, rejected, torch.tensor([3]), torch.tensor([2]))
    assert pairs.margin_P == 0


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_counts_of_tokens_matter_only_to_losses_per_token(name, pairs):
    longer = replace(pairs, chosen_tokens_P=2 * pairs.chosen_tokens_P)
    assert torch.equal(loss_of(name, pairs), loss_of(name, longer)) == (name not in PER_TOKEN)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_twice_the_length_at_the_same_log_probability_a_token_leaves_losses_per_token_alone(name, pairs):
    twice = replace(
        pairs,
        chosen_P=2 * pairs.chosen_P,
        reference_chosen_P=2 * pairs.reference_chosen_P,
        chosen_tokens_P=2 * pairs.chosen_tokens_P,
    )
    assert torch.allclose(loss_of(name, pairs), loss_of(name, twice), rtol=1e-12) == (name in PER_TOKEN)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_only_losses_without_a_reference_leave_it_unread(name, pairs):
    zeros = torch.zeros_like(pairs.chosen_P)
    other = replace(pairs, reference_chosen_P=zeros, reference_rejected_P=zeros)
    assert torch.equal(loss_of(name, pairs), loss_of(name, other)) == (name in WITHOUT_REFERENCE)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_pair_alone_has_the_loss_it_has_in_a_batch_unless_the_loss_couples_them(name, pairs):
    alone = torch.cat([loss_of(name, part(pairs, [i])) for i in range(5)])
    assert torch.allclose(alone, loss_of(name, pairs), rtol=1e-12) == (name not in OVER_THE_BATCH)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_order_of_pairs_does_not_change_the_mean(name, pairs):
    shuffled = part(pairs, [3, 1, 4, 0, 2])
    torch.testing.assert_close(loss_of(name, pairs).mean(), loss_of(name, shuffled).mean())


@settings(deadline=None)
@given(shift=st.floats(-30, 30), name=st.sampled_from(sorted(PREFERENCE_LOSSES.keys() - WITHOUT_REFERENCE - {"aot"})))
def test_what_policy_and_reference_agree_on_does_not_matter(shift, name):
    c, r, c_ref, r_ref = torch.tensor([[-4.0, -9.0], [-6.0, -3.0], [-5.0, -7.0], [-5.0, -8.0]], dtype=torch.float64)
    tokens = torch.tensor([3, 4])
    here = PairLogprobs(c, r, c_ref, r_ref, tokens, tokens)
    there = PairLogprobs(c + shift, r, c_ref + shift, r_ref, tokens, tokens)
    torch.testing.assert_close(loss_of(name, here), loss_of(name, there), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_gradients_are_those_of_finite_differences(name, pairs):
    def loss(chosen, rejected):
        return loss_of(name, replace(pairs, chosen_P=chosen, rejected_P=rejected)).mean()

    inputs = (pairs.chosen_P.clone().requires_grad_(), pairs.rejected_P.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_sft_of_parts_of_a_batch_adds_up_to_that_of_the_batch(pairs):
    told = replace(pairs, mean_chosen_tokens=pairs.chosen_tokens_P.double().mean())
    parts = [loss_of("sft", part(told, indices)).sum() for indices in ([0], [1, 2, 3], [4])]
    torch.testing.assert_close(torch.stack(parts).sum(), loss_of("sft", pairs).sum())


def test_alpha_divergence_tends_to_dpo_at_one(pairs):
    near = PREFERENCE_LOSSES["f_alpha"](pairs, beta=0.1, alpha=1 + 1e-7)
    torch.testing.assert_close(near, loss_of("sigmoid", pairs), rtol=1e-5, atol=1e-5)


def test_exo_is_zero_where_the_policy_is_as_sure_as_the_labels():
    margin = torch.tensor([math.log(0.9 / 0.1) / 0.1], dtype=torch.float64)
    zero, one = torch.zeros_like(margin), torch.ones(1)
    pairs = PairLogprobs(margin, zero, zero, zero, one, one)
    torch.testing.assert_close(PREFERENCE_LOSSES["exo_pair"](pairs, beta=0.1, label_smoothing=0.1), zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_of_an_answer_that_is_certain_has_finite_gradients(dtype):
    certain = torch.zeros(1, dtype=dtype, requires_grad=True)
    other = torch.full((1,), -3.0, dtype=dtype)
    one = torch.ones(1, dtype=torch.int64)
    for chosen, rejected in ((certain, other), (other, certain)):
        loss = loss_of("orpo", PairLogprobs(chosen, rejected, other, other, one, one))
        (grad,) = torch.autograd.grad(loss.sum(), certain)
        assert loss.isfinite()
        assert grad.isfinite()


def test_a_weighted_sum_is_linear_in_its_terms(pairs):
    terms = [Term("sigmoid", SETTINGS["sigmoid"], 0.8), Term("bco_pair", SETTINGS["bco_pair"], 0.2), Term("sft")]
    by_hand = 0.8 * loss_of("sigmoid", pairs) + 0.2 * loss_of("bco_pair", pairs) + loss_of("sft", pairs)
    torch.testing.assert_close(weighted_sum(pairs, terms), by_hand)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=1, max_size=5))
def test_the_running_mean_is_the_mean_of_the_batches_means(batches):
    running = RunningMean()
    for batch in batches:
        running = running.with_batch(torch.tensor(batch, dtype=torch.float64, requires_grad=True).sum(), len(batch))
    assert float(running.mean) == pytest.approx(sum(sum(batch) / len(batch) for batch in batches) / len(batches), abs=1e-12)
    assert isinstance(running.mean, torch.Tensor)
    assert not running.mean.requires_grad


def test_metrics_carry_no_gradient_and_count_a_tie_as_wrong(pairs):
    pairs = replace(pairs, chosen_P=pairs.chosen_P.requires_grad_())
    chosen, rejected = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 1.0])
    metrics = preference_metrics(part(pairs, [0, 1]), chosen, rejected)
    assert metrics["rewards/accuracies"] == (1, 2)
    assert metrics["rewards/margins"] == (1, 2)
    assert not any(total.requires_grad for total, _ in metrics.values())


@pytest.mark.parametrize("chosen", [-3000.0, -100.0, 0.0, 100.0, 3000.0])
@pytest.mark.parametrize("rejected", [-3000.0, 0.0, 100.0])
@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES.keys() - WITHOUT_REFERENCE))
def test_answers_far_from_the_reference_have_losses_and_slopes_that_are_numbers(name, chosen, rejected):
    policy = torch.tensor([[chosen], [rejected]], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    loss = PREFERENCE_LOSSES[name](PairLogprobs(*policy, zero, zero, one, one), **SETTINGS[name] | {"beta": 1.0})
    (slopes,) = torch.autograd.grad(loss.sum(), policy)
    assert loss.isfinite().all() and slopes.isfinite().all()


def test_answers_that_come_alike_share_out_the_slopes_of_a_sorted_loss_in_their_order():
    alike = torch.zeros(3, requires_grad=True)
    reference, zero, one = torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3), torch.ones(3)
    loss = PREFERENCE_LOSSES["aot"](PairLogprobs(alike, zero, reference, zero, one, one), beta=1.0)
    (slopes,) = torch.autograd.grad(loss.sum(), alike)
    torch.testing.assert_close(slopes, -torch.sigmoid(torch.tensor([1.0, 2.0, 3.0])))

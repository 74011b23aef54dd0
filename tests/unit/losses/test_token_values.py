from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical
from torch.nn import functional as F

from raytune_llm.losses.tokens import (
    asft,
    cross_entropy,
    dft,
    eaft,
    segment_counts,
    segment_sums,
    split_sums,
    token_correct,
    token_entropy,
    token_kl,
    token_logprobs,
    total_and_count,
)

TOKEN_LOSSES = {"cross_entropy": cross_entropy, "dft": dft, "eaft": eaft, "asft": asft}


@pytest.fixture
def logits():
    return 3 * torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets():
    return torch.tensor([3, 0, 39, 7, 7, 21])


def losses_of(logits, targets, reference):
    settings = {"cross_entropy": {"label_smoothing": 0.1}, "asft": {"reference_logits_NV": reference, "alpha": 0.5}}
    return {name: loss(logits, targets, **settings.get(name, {})) for name, loss in TOKEN_LOSSES.items()}


def test_probabilities_of_all_targets_add_up_to_one(logits):
    every_target = torch.arange(40).repeat(6)
    logprobs = token_logprobs(logits.repeat_interleave(40, 0), every_target, temperature=0.7)
    torch.testing.assert_close(logprobs.exp().view(6, 40).sum(-1), torch.ones(6, dtype=torch.float64))


@settings(deadline=None)
@given(shift=st.floats(-50, 50))
def test_adding_a_constant_to_the_logits_changes_no_loss(shift):
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 5, 32, dtype=torch.float64, generator=generator).unbind()
    targets = torch.arange(5)
    before, after = losses_of(logits, targets, reference), losses_of(logits + shift, targets, reference - shift)
    for name in TOKEN_LOSSES:
        torch.testing.assert_close(before[name], after[name], rtol=1e-9, atol=1e-9)


def test_a_chunk_of_the_tokens_gives_its_share_of_the_values(logits, targets):
    whole, first, rest = (losses_of(logits[i], targets[i], -logits[i]) for i in (slice(None), slice(2), slice(2, None)))
    for name in TOKEN_LOSSES:
        torch.testing.assert_close(torch.cat([first[name], rest[name]]), whole[name])


def test_bfloat16_logits_are_computed_in_float32(logits, targets):
    half = logits.bfloat16()
    for value, wide in ((f(half, targets), f(half.float(), targets)) for f in (token_logprobs, cross_entropy, dft, eaft)):
        assert value.dtype == torch.float32
        assert torch.equal(value, wide)


def test_entropy_of_equal_logits_is_log_of_their_number():
    torch.testing.assert_close(token_entropy(torch.zeros(2, 50)), torch.full((2,), math.log(50)))


def test_tokens_ruled_out_add_nothing_to_entropy():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    entropy = token_entropy(logits)
    entropy.sum().backward()
    torch.testing.assert_close(entropy, torch.tensor([math.log(2)]))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (partial(token_logprobs, temperature=0.7), lambda x, t: F.log_softmax(x / 0.7, -1).gather(1, t[:, None]).squeeze(1)),
        (partial(cross_entropy, label_smoothing=0.2), partial(F.cross_entropy, label_smoothing=0.2, reduction="none")),
        (partial(cross_entropy, z_loss=0.3), lambda x, t: F.cross_entropy(x, t, reduction="none") + 0.3 * x.logsumexp(-1) ** 2),
        (lambda x, t: token_entropy(x, temperature=0.7), lambda x, t: Categorical(logits=x / 0.7).entropy()),
    ],
    ids=["logprobs", "smoothing", "z_loss", "entropy"],
)
def test_values_and_gradients_are_those_of_torch(ours, plain, logits, targets):
    logits.requires_grad_()
    upstream = torch.arange(1.0, 7.0, dtype=torch.float64)
    torch.testing.assert_close(ours(logits, targets), plain(logits, targets), rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(function(logits, targets), logits, upstream)[0] for function in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [token_logprobs, cross_entropy, lambda logits, targets: token_entropy(logits)])
def test_compiled_functions_say_and_learn_the_same(function, logits, targets):
    torch._dynamo.reset()
    logits.requires_grad_()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, targets), function(logits, targets))
    gradients = [torch.autograd.grad(one(logits, targets).sum(), logits)[0] for one in (compiled, function)]
    torch.testing.assert_close(*gradients)


def test_dft_scales_the_gradient_of_a_token_by_its_probability(logits, targets):
    logits.requires_grad_()
    (of_dft,) = torch.autograd.grad(dft(logits, targets).sum(), logits)
    (of_nll,) = torch.autograd.grad(cross_entropy(logits, targets).sum(), logits)
    probability = token_logprobs(logits, targets).exp().detach()
    torch.testing.assert_close(of_dft, probability[:, None] * of_nll)


def test_eaft_takes_a_vocabulary_under_twenty():
    logits = torch.zeros(1, 8)
    torch.testing.assert_close(eaft(logits, torch.tensor([2])), torch.tensor([math.log(8) ** 2 / 3]))


def test_asft_at_the_reference_is_dft_and_trains_only_the_policy(logits, targets):
    reference = logits.clone().requires_grad_()
    logits.requires_grad_()
    loss = asft(logits, targets, reference_logits_NV=reference, alpha=0.3)
    loss.sum().backward()
    torch.testing.assert_close(loss, dft(logits, targets))
    assert reference.grad is None


def test_kl_is_zero_only_between_equals(logits):
    torch.testing.assert_close(token_kl(logits, logits + 1), torch.zeros(6, dtype=torch.float64))
    assert (token_kl(logits, -logits) > 0).all()


def test_a_token_is_correct_when_it_is_the_likeliest():
    assert token_correct(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1])).tolist() == [True, False]


def test_weights_count_in_the_sum_and_in_what_it_is_divided_by():
    values, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.5, 0.0])
    assert total_and_count(values) == (7.0, 3)
    assert total_and_count(values, weights) == (2.0, 1.5)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data())
def test_two_parts_of_documents_add_up_to_their_sums(lengths, data):
    shared = torch.tensor([data.draw(st.integers(0, 6)) for _ in lengths])
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    values = torch.arange(1, len(document) + 1).double()
    head, tail = split_sums(values, document, shared)
    by_hand = [part[:cut].sum() for part, cut in zip(values.split(lengths), shared.tolist(), strict=True)]
    assert head.tolist() == by_hand
    assert torch.equal(head + tail, segment_sums(values, document, len(lengths)))
    assert segment_counts(document, len(lengths)).tolist() == lengths


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_a_token_that_the_model_is_sure_of_weighs_nothing_and_is_a_number(alpha):
    logits = torch.zeros(64, 50)
    logits[:, 7] = torch.linspace(10, 60, 64)
    logits += torch.linspace(-900, 900, 64)[:, None]
    logits.requires_grad_()
    losses = eaft(logits, torch.full((64,), 3), alpha=alpha)
    losses.sum().backward()
    assert (losses.detach() >= 0).all() and logits.grad is not None and logits.grad.isfinite().all()


def test_tokens_that_are_ruled_out_add_nothing_to_a_divergence():
    p, q = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ruled_out = torch.full((4, 3), -torch.inf, dtype=torch.float64)
    wide_q = torch.cat([q, ruled_out], 1).requires_grad_()
    divergence = token_kl(torch.cat([p, ruled_out], 1), wide_q)
    torch.testing.assert_close(divergence.detach(), token_kl(p, q))
    (grad,) = torch.autograd.grad(divergence.sum(), wide_q)
    assert grad.isfinite().all() and (grad[:, 9:] == 0).all()


def test_a_divergence_does_not_hide_what_is_not_a_number():
    p, q = torch.zeros(2, 2, 5)
    p[0, 1] = q[1, 2] = torch.nan
    assert token_kl(p, q).isnan().all()

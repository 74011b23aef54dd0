from __future__ import annotations

import torch

from raytune_llm.losses.kto import apo_zero_unpaired, desirable_nll, kto, kto_metrics, reference_point

RATIO = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
DESIRABLE = torch.tensor([True, False, True, False])


def test_at_the_reference_point_every_answer_has_half_its_weight():
    losses = kto(torch.full((4,), 0.7), DESIRABLE, 0.7, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
    torch.testing.assert_close(losses, torch.tensor([0.75, 0.25, 0.75, 0.25]))


def test_desirable_answers_are_pushed_up_and_undesirable_ones_down():
    ratio = RATIO.clone().requires_grad_()
    kto(ratio, DESIRABLE, 0.1, beta=0.5).sum().backward()
    assert ratio.grad is not None
    assert torch.equal(ratio.grad < 0, DESIRABLE)


def test_the_clamp_of_the_kl_term_comes_after_the_mean():
    assert reference_point(torch.tensor(3.0) + torch.tensor(-1.0), 4) == 0.5
    assert reference_point(torch.tensor(-1.0), 4) == 0.0


def test_the_kl_term_has_no_gradient():
    assert not reference_point(torch.tensor(3.0, requires_grad=True), 4).requires_grad


def test_apo_does_not_look_at_the_kl_term():
    torch.testing.assert_close(apo_zero_unpaired(RATIO, DESIRABLE, 9.0, beta=0.1), kto(RATIO, DESIRABLE, 0.0, beta=0.1))


def test_cross_entropy_of_desirable_answers_is_their_plain_mean_however_the_batch_is_split():
    policy, tokens = torch.tensor([-2.0, -9.0, -6.0, -5.0], dtype=torch.float64), torch.tensor([2, 3, 4, 5])
    whole = desirable_nll(policy, tokens, DESIRABLE)
    parts = [desirable_nll(policy[i], tokens[i], DESIRABLE[i], rows_per_desirable=4 / 2) for i in (slice(1), slice(1, None))]
    assert whole.mean() == 1.25
    torch.testing.assert_close(torch.cat(parts), whole)


def test_without_desirable_answers_there_is_no_cross_entropy():
    assert torch.equal(desirable_nll(RATIO, torch.ones(4), torch.zeros(4).bool()), torch.zeros(4, dtype=torch.float64))


def test_a_side_without_answers_counts_none():
    metrics = kto_metrics(RATIO, RATIO, torch.ones(4).bool(), torch.tensor(0.0), beta=2.0)
    assert metrics["rewards/chosen"] == (3.0, 4)
    assert metrics["rewards/rejected"] == (0.0, 0)

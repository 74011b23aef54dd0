"""What a step of the preference stages is, against its definition."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from raytune_llm.config.stage import DPO_READS, DPOLoss
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.stages.logprobs import answer_logprobs, answer_tokens
from tests.models import VOCABULARY, tiny_llama
from tests.steps import make_store, objective_of, run_step, step_of


@pytest.fixture
def step(tmp_path):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 9, (6, 3)).tolist()
    rows = [PairRow(*(draw.integers(1, VOCABULARY, length).astype(np.int32) for length in row)) for row in lengths]
    return step_of(make_store(tmp_path, "pairs", rows), max_length=24, packing=True, micro=2)


@pytest.mark.parametrize("overrides", [[], ["stage.ld_alpha=0.5"]])
def test_a_policy_that_is_its_reference_has_a_loss_of_log_2_and_no_margin(step, overrides):
    model = tiny_llama()
    out = run_step(model, objective_of("stage=dpo", *overrides), step, model)
    assert math.isclose(out.loss, math.log(2), rel_tol=1e-6)
    assert out.metrics["rewards/margins"] == out.metrics["rewards/accuracies"] == out.metrics["rewards/chosen"] == 0


def test_without_a_reference_rewards_are_the_policys_own(step):
    out = run_step(tiny_llama(), objective_of("stage=dpo", "stage.reference=none", "stage.beta=0.5"), step)
    assert math.isclose(out.metrics["rewards/chosen"], 0.5 * out.metrics["logps/chosen"], rel_tol=1e-6)


def test_ld_alpha_of_one_is_plain_dpo_and_of_zero_forgets_what_is_longer(step):
    model = tiny_llama()
    for batch in step.batches:
        plain, none = answer_logprobs(model, batch), answer_logprobs(model, batch, ld_alpha=0.0)
        assert torch.allclose(plain, answer_logprobs(model, batch, ld_alpha=1.0))
        assert torch.all(none >= plain) and torch.all((none == plain).any(1))


def test_a_weighted_sum_of_losses_is_the_sum_of_their_steps(step):
    model, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    parts = [run_step(model, objective_of("stage=dpo", f"stage.loss={name}"), step, reference) for name in ("ipo", "nca_pair")]
    out = run_step(model, objective_of("stage=dpo", "stage.loss={ipo:0.3,nca_pair:2.0}"), step, reference)
    assert math.isclose(out.loss, 0.3 * parts[0].loss + 2.0 * parts[1].loss, rel_tol=1e-5)
    for name, gradient in out.gradients.items():
        expected = 0.3 * parts[0].gradients[name] + 2.0 * parts[1].gradients[name]
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)


SMOOTHED = sorted(name for name, settings in DPO_READS.items() if "label_smoothing" in settings)


@pytest.mark.parametrize("name", get_args(DPOLoss))
def test_every_loss_of_dpo_makes_a_step(step, name):
    smoothing = ["stage.label_smoothing=0.1"] if name in SMOOTHED else []
    objective = objective_of("stage=dpo", f"stage.loss={name}", *smoothing)
    out = run_step(tiny_llama(seed=0), objective, step, tiny_llama(seed=1))
    assert math.isfinite(out.loss) and out.grad_norm > 0


def test_smoothing_reaches_the_losses_that_take_it(step):
    model, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    for name in SMOOTHED:
        one, two = (
            run_step(model, objective_of("stage=dpo", f"stage.loss={name}", f"stage.label_smoothing={e}"), step, reference).loss
            for e in (0.1, 0.2)
        )
        assert one != two, name


@pytest.mark.parametrize("stage", ["simpo", "cpo"])
def test_the_weight_of_cross_entropy_adds_the_chosen_answers(step, stage):
    model = tiny_llama()
    plain, more, twice = (run_step(model, objective_of(f"stage={stage}", f"stage.sft_weight={w}"), step).loss for w in (0, 1, 2))
    assert math.isclose(twice - more, more - plain, rel_tol=1e-4)
    nll = -sum(float(answer_logprobs(model, batch)[:, 0].sum()) for batch in step.batches)
    tokens = sum(int(answer_tokens(batch)[:, 0].sum()) for batch in step.batches)
    assert math.isclose(more - plain, nll / tokens, rel_tol=1e-4)

"""Losses that couple the rows of a global batch, however it is cut into micro-batches and over workers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from raytune_llm.data.kinds.labeled import LabeledRow
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.losses.preference import PREFERENCE_LOSSES, PairLogprobs
from raytune_llm.stages.logprobs import answer_logprobs, answer_tokens
from tests.models import VOCABULARY, tiny_llama
from tests.steps import make_store, objective_of, run_step, step_of

CUTS = [(True, 1), (True, 4), (False, 1), (False, 16)]


def ids(draw: np.random.Generator, length: int) -> np.ndarray:
    return draw.integers(1, VOCABULARY, length).astype(np.int32)


@pytest.fixture
def pairs(tmp_path):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 9, (9, 3)).tolist()
    return make_store(tmp_path, "pairs", [PairRow(*(ids(draw, length) for length in row)) for row in lengths])


@pytest.fixture
def labeled(tmp_path):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 9, (9, 2)).tolist()
    rows = [LabeledRow(*(ids(draw, length) for length in row), desirable=n % 3 > 0) for n, row in enumerate(lengths)]
    return make_store(tmp_path, "labeled", rows)


def assert_same(ours, theirs):
    assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-5)
    assert math.isclose(ours.grad_norm, theirs.grad_norm, rel_tol=1e-5)
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in theirs.metrics.items():
        assert math.isclose(ours.metrics[name], value, rel_tol=1e-4, abs_tol=1e-6), name
    for name, gradient in theirs.gradients.items():
        assert torch.allclose(ours.gradients[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    "loss", ["aot", "aot_unpaired", "bco_pair", "{sigmoid:0.8,bco_pair:0.2,sft:1.0}", "{sigmoid:1.0,sft:0.5}"]
)
def test_dpo_losses_of_the_whole_batch_do_not_depend_on_how_it_is_cut(loss, pairs):
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    objective = objective_of("stage=dpo", f"stage.loss={loss}", "stage.beta=0.3")
    cut = [
        run_step(policy, objective, step_of(pairs, max_length=24, packing=packing, micro=micro), reference)
        for packing, micro in CUTS
    ]
    for one in cut[1:]:
        assert_same(one, cut[0])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_the_second_pass_gives_the_gradient_of_the_loss_on_all_pairs_at_once(name, pairs):
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    step = step_of(pairs, max_length=24, packing=False, micro=16)
    (batch,) = step.batches
    with torch.no_grad():
        reference_P2 = answer_logprobs(reference, batch)
    everything = PairLogprobs(*answer_logprobs(policy, batch).unbind(1), *reference_P2.unbind(1), *answer_tokens(batch).unbind(1))
    loss = PREFERENCE_LOSSES[name](everything, beta=0.3).mean()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    parts = step_of(pairs, max_length=24, packing=False, micro=2)
    out = run_step(policy, objective_of("stage=dpo", f"stage.loss={name}", "stage.beta=0.3"), parts, reference)
    assert math.isclose(out.loss, loss.item(), rel_tol=1e-5)
    for name, gradient in expected.items():
        assert torch.allclose(out.gradients[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("overrides", [["stage.sft_weight=0.3"], ["stage.loss=apo_zero_unpaired"]])
def test_kto_does_not_depend_on_how_the_batch_is_cut(overrides, labeled):
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    objective = objective_of("stage=kto", "stage.beta=0.3", *overrides)
    cut = [
        run_step(policy, objective, step_of(labeled, max_length=24, packing=packing, micro=micro), reference)
        for packing, micro in CUTS
    ]
    for one in cut[1:]:
        assert_same(one, cut[0])


def test_every_row_of_a_step_has_a_place_over_workers_and_micro_batches(pairs):
    world, seen = 2, {}
    for rank in range(world):
        step = step_of(pairs, max_length=24, packing=True, micro=1, rank=rank, world=world)
        for batch, first in zip(step.batches, step.first_rows, strict=True):
            seen |= {first + n: row for n, row in enumerate(batch.rows)}
    whole = step_of(pairs, max_length=24, packing=True, micro=16)
    assert [seen[place] for place in range(len(pairs))] == list(whole.batches[0].rows)


def test_batches_of_padding_alone_add_nothing(pairs):
    policy = tiny_llama(seed=0)
    step = step_of(pairs, max_length=24, packing=True, micro=16)
    (batch,) = step.batches
    empty = step_of(pairs, max_length=24, packing=True, micro=16, rank=1, world=2)
    assert len(empty.batches[0].rows) == 0
    both = replace(step, batches=[batch, *empty.batches], first_rows=[*step.first_rows, *empty.first_rows])
    for loss in ("bco_pair", "{sigmoid:1.0,sft:1.0}"):
        objective = objective_of("stage=dpo", f"stage.loss={loss}", "stage.reference=none")
        assert_same(run_step(policy, objective, both), run_step(policy, objective, step))


@pytest.mark.parametrize("only", [True, False])
def test_verdicts_of_one_kind_alone_have_a_finite_loss_and_gradient(only, tmp_path):
    draw = np.random.default_rng(0)
    store = make_store(tmp_path, "labeled", [LabeledRow(ids(draw, 3), ids(draw, 4), desirable=only) for _ in range(3)])
    step = step_of(store, max_length=24, packing=True, micro=1)
    objective = objective_of("stage=kto", "stage.sft_weight=0.5")
    out = run_step(tiny_llama(seed=0), objective, step, tiny_llama(seed=1))
    side, other = ("chosen", "rejected") if only else ("rejected", "chosen")
    assert math.isfinite(out.loss) and math.isfinite(out.grad_norm) and out.grad_norm > 0
    assert f"rewards/{side}" in out.metrics and f"rewards/{other}" not in out.metrics

"""Whole steps of the preference stages on a tiny model, through store, loader and objective, against values computed in float64
from the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.losses.reward import bradley_terry, centering
from raytune_llm.models import attention
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import load_model
from raytune_llm.models.scorer import Scorer
from raytune_llm.records import LossOut
from raytune_llm.stages import Objective
from raytune_llm.stages.reward import pair_scores
from tests.parity.sets import folder, oracle
from tests.steps import Outcome, labeled_rows, make_store, objective_of, pair_rows, run_step, step_of

FOLDER = folder("losses")
LAYOUTS = {"packed": (True, 8), "packs one by one": (True, 1), "rows joined": (False, 8), "rows one by one": (False, 1)}


def cases(*kinds: str) -> list[Any]:
    everything = oracle("model_steps")["cases"]
    return [pytest.param(case, id=case["id"]) for case in everything if case["kind"] in kinds]


def model_of(folder: str, backend: str = "varlen") -> CausalLM:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / folder, dtype=torch.float32)
    attention.attach(model, backend)
    return CausalLM(model)


def assert_reference_values(out: Outcome, expected: dict[str, Any]) -> None:
    assert math.isclose(out.loss, expected["loss"], rel_tol=2e-5)
    assert math.isclose(out.grad_norm, expected["grad_norm"], rel_tol=2e-5)
    for name, reference in expected["grads"].items():
        grad = out.gradients[f"model.{name}"]
        assert math.isclose(grad.abs().sum().item(), reference["abs_sum"], rel_tol=2e-5)
        # those of the embedding are its first five that are not 0
        first5 = grad.flatten()[:5] if name != "model.embed_tokens.weight" else grad[grad != 0][:5]
        assert torch.allclose(first5, torch.tensor(reference["first5"]), rtol=1e-3, atol=2e-6 * out.grad_norm)


STAGES = {
    "dpo": lambda p: ["stage=dpo", f"stage.beta={p['beta']}"],
    "ipo": lambda p: ["stage=dpo", "stage.loss=ipo", f"stage.beta={p['beta']}"],
    "orpo": lambda p: ["stage=orpo", f"stage.beta={p['beta']}"],
    "simpo": lambda p: ["stage=simpo", f"stage.beta={p['beta']}", f"stage.gamma={p['gamma']}"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
@pytest.mark.parametrize("case", cases(*STAGES))
def test_a_step_over_pairs_has_the_reference_loss_and_gradients(
    case: dict[str, Any], backend: str, layout: str, tmp_path: Path
) -> None:
    store = make_store(tmp_path, "pairs", pair_rows(case["inputs"]["chosen"], case["inputs"]["rejected"]))
    packing, micro = LAYOUTS[layout]
    step = step_of(store, max_length=16, packing=packing, micro=micro)
    objective = objective_of(*STAGES[case["kind"]](case["params"]))
    reference = None if objective.reference is None else model_of("tiny_llama_ref", backend)
    out = run_step(model_of("tiny_llama", backend), objective, step, reference)
    assert_reference_values(out, case["expected"])
    for name, value in case["expected"].get("metrics", {}).items():
        assert math.isclose(out.metrics[name], value, rel_tol=2e-5, abs_tol=2e-6), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases("kto"))
def test_a_step_over_labelled_answers_has_the_reference_loss_and_gradients(
    case: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    store = make_store(tmp_path, "labeled", labeled_rows(case["inputs"]["rows"], case["inputs"]["label"]))
    packing, micro = LAYOUTS[layout]
    step = step_of(store, max_length=16, packing=packing, micro=micro)
    p = case["params"]
    weights = [f"stage.desirable_weight={p['w_d']}", f"stage.undesirable_weight={p['w_u']}"]
    objective = objective_of("stage=kto", f"stage.beta={p['beta']}", *weights)
    out = run_step(model_of("tiny_llama"), objective, step, model_of("tiny_llama_ref"))
    assert_reference_values(out, case["expected"])
    assert math.isclose(out.metrics["kl"], case["expected"]["kl"], rel_tol=1e-4, abs_tol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases("rm"))
def test_a_step_of_a_reward_model_has_the_reference_loss_and_gradients(case: dict[str, Any], layout: str, tmp_path: Path) -> None:
    store = make_store(tmp_path, "pairs", pair_rows(case["inputs"]["chosen"], case["inputs"]["rejected"]))
    packing, micro = LAYOUTS[layout]
    step = step_of(store, max_length=16, packing=packing, micro=micro)
    config = AutoConfig.from_pretrained(FOLDER / "tiny_llama")
    base: Any = load_model(config, str(FOLDER / "tiny_llama"), weights="pretrained", dtype=torch.float32, seed=0, scores=True)
    base.score.weight.data[0] = torch.tensor(case["inputs"]["score_weight"])
    attention.attach(base, "varlen")
    model = Scorer(base)

    def loss(model: Any, batch: Any) -> LossOut:
        chosen_P, rejected_P = pair_scores(model, batch).unbind(1)
        margin_P = torch.tensor([case["inputs"]["margin"][row] for row in batch.rows])
        loss_P = bradley_terry(chosen_P, rejected_P, margin_P) + case["params"]["center"] * centering(chosen_P, rejected_P)
        return LossOut(loss_P.sum(), len(loss_P))

    out = run_step(model, Objective(loss=loss), step)
    num_pairs = len(store)
    for batch in step.batches:
        for (chosen, rejected), row in zip(pair_scores(model, batch).tolist(), batch.rows, strict=True):
            assert math.isclose(chosen, case["expected"]["scores"][row], rel_tol=2e-5, abs_tol=2e-5)
            assert math.isclose(rejected, case["expected"]["scores"][num_pairs + row], rel_tol=2e-5, abs_tol=2e-5)
    del out.gradients["model.score.weight"]
    norm = float(torch.nn.utils.get_total_norm(list(out.gradients.values())))
    assert_reference_values(replace(out, grad_norm=norm), case["expected"])

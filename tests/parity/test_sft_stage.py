"""The variants of stage=sft, as a run computes them: token losses in float64 and full steps of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.models.head import together
from raytune_llm.records import Batch
from tests.parity.sets import oracle
from tests.parity.test_stage_steps import LAYOUTS, assert_reference_values, cases, model_of
from tests.steps import make_store, objective_of, run_step, step_of

ORACLE = oracle("sft")
SETTINGS = {
    "ce": lambda p: [],
    "nll_sum": lambda p: [],
    "label_smoothing": lambda p: [f"stage.label_smoothing={p['eps']}"],
    "z_loss": lambda p: [f"stage.z_loss={p['coef']}"],
    "dft": lambda p: ["stage.loss=dft"],
    "eaft": lambda p: ["stage.loss=eaft", f"stage.eaft_alpha={p['alpha']}"],
    "asft": lambda p: ["stage.loss=asft", f"stage.asft_alpha={p['alpha']}"],
}


class GivenLogits(nn.Module):
    """A model that says the same whatever it is given."""

    def __init__(self, logits_NV: Tensor, reference_NV: Tensor) -> None:
        super().__init__()
        self.logits, self.reference = logits_NV, reference_NV

    def forward(self, batch: Batch, token_function: Any, *, beside_reference: bool = False) -> Tensor:
        return together(token_function(self.logits, batch.targets_N, *([self.reference] if beside_reference else [])))


@pytest.mark.parametrize("case", [case for case in ORACLE["cases"] if case["kind"] in SETTINGS], ids=lambda case: case["id"])
def test_a_loss_of_the_stage_is_the_formulas(case: dict[str, Any]) -> None:
    inputs, expected, params = ORACLE["inputs"][case["input"]], case["expected"], case["params"]
    labels = torch.tensor(inputs["labels"])[:, 1:]
    trained = labels != -100
    logits = torch.tensor(inputs["logits"], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(inputs["ref_logits"], dtype=torch.float64)
    batch = Batch(
        ids_BT=torch.zeros_like(labels),
        targets_N=labels[trained],
        positions_BT=torch.zeros_like(labels),
        trained_N=trained.flatten().nonzero()[:, 0],
        cu_seqlens_S=torch.tensor([0, labels.numel()]),
        max_seqlen=labels.numel(),
    )
    objective = objective_of("stage=sft", "adapter=lora", *SETTINGS[case["kind"]](params))
    model = GivenLogits(logits[:, :-1][trained], reference[:, :-1][trained])
    out = objective.loss(model, batch)
    loss = out.total if case["kind"] == "nll_sum" else out.total / params.get("num_items", out.count)
    loss.backward()
    assert out.count == expected["num_target_tokens"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9, abs=1e-9)
    assert logits.grad is not None
    assert logits.grad.abs().sum().item() == pytest.approx(expected["grad"]["abs_sum"], rel=1e-9, abs=1e-9)
    right = (logits[:, :-1][trained].argmax(-1) == labels[trained]).sum()
    assert out.metrics["token_accuracy"] == (right, out.count)


def token_rows(rows: list[tuple[list[int], list[int]]]) -> list[ConversationRow]:
    return [
        ConversationRow(np.array(prompt + answer, np.int32), np.array([len(prompt), len(prompt) + len(answer)], np.int32))
        for prompt, answer in rows
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases("sft"))
def test_a_step_has_the_reference_loss_and_gradients(case: dict[str, Any], layout: str, tmp_path: Path) -> None:
    rows, expected = token_rows(case["inputs"]["rows"]), case["expected"]
    packing, micro = LAYOUTS[layout]
    step = step_of(make_store(tmp_path, "conversations", rows), max_length=24, packing=packing, micro=micro)
    assert step.count == expected["num_target_tokens"]
    out = run_step(model_of("tiny_llama"), objective_of("stage=sft"), step)
    assert_reference_values(out, expected)
    for name, wrong in (case.get("must_not_equal") or {}).items():
        assert abs(out.loss - wrong) > 1e-4 * abs(wrong), name

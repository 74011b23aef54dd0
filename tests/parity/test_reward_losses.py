"""Bradley-Terry against the published formula in float64: values, gradients, metrics."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.losses.reward import bradley_terry, centering, reward_metrics
from tests.parity.sets import oracle

ORACLE = oracle("reward")


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: case["id"])
def test_reward_loss_its_gradient_and_metrics_are_the_formulas(case):
    inputs, params, expected = ORACLE["inputs"][case["input"]], case["params"], case["expected"]
    chosen, rejected = (torch.tensor(inputs[side], dtype=torch.float64, requires_grad=True) for side in ("chosen", "rejected"))
    margin = torch.tensor(inputs["margin"], dtype=torch.float64) if params.get("margin") else None

    losses = bradley_terry(chosen, rejected, margin)
    loss = (losses + params.get("center", 0.0) * centering(chosen, rejected)).mean()
    loss.backward()

    close(losses, expected["losses"])
    close(loss, expected["loss"])
    close(chosen.grad, expected["grad_chosen"])
    close(rejected.grad, expected["grad_rejected"])
    metrics = {name: (total / count).item() for name, (total, count) in reward_metrics(chosen, rejected).items()}
    assert metrics == pytest.approx(expected["metrics"], rel=1e-9, abs=1e-9)

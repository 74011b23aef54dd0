"""Token losses against published formulas in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.losses.tokens import asft, cross_entropy, dft, eaft, segment_counts, segment_sums, total_and_count
from tests.parity.llamafactory import IGNORE
from tests.parity.sets import oracle

ORACLE = oracle("sft")


def sft_loss(kind, params, logits, targets, reference_logits, weights, row):
    """The loss of one case, from the logits and targets of its trained positions."""
    match kind:
        case "ce" | "nll_sum" | "ce_sequence_mean" | "weighted":
            values = cross_entropy(logits, targets)
        case "label_smoothing":
            values = cross_entropy(logits, targets, label_smoothing=params["eps"])
        case "z_loss":
            values = cross_entropy(logits, targets, z_loss=params["coef"])
        case "dft":
            values = dft(logits, targets)
        case "eaft":
            values = eaft(logits, targets, alpha=params["alpha"])
        case "asft":
            values = asft(logits, targets, reference_logits_NV=reference_logits, alpha=params["alpha"])
        case _:
            raise AssertionError(f"no loss for {kind}")
    if kind == "ce_sequence_mean":
        num_rows = int(row.max()) + 1
        return (segment_sums(values, row, num_rows) / segment_counts(row, num_rows)).mean()
    total, count = total_and_count(values, weights if kind == "weighted" else None)
    return total if kind == "nll_sum" else total / params.get("num_items", count)


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: case["id"])
def test_token_loss_and_its_gradient_are_the_formulas(case):
    inputs, expected = ORACLE["inputs"][case["input"]], case["expected"]
    logits = torch.tensor(inputs["logits"], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(inputs["labels"])[:, 1:]
    trained = labels != IGNORE
    reference_logits = torch.tensor(inputs["ref_logits"], dtype=torch.float64)[:, :-1][trained]
    weights = torch.tensor(inputs["token_weights"], dtype=torch.float64)[:, 1:][trained]

    row = trained.nonzero()[:, 0]
    loss = sft_loss(case["kind"], case["params"], logits[:, :-1][trained], labels[trained], reference_logits, weights, row)
    loss.backward()

    assert trained.sum() == expected["num_target_tokens"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9, abs=1e-9)
    grad = logits.grad
    assert grad is not None
    b, t = expected["grad_row_at"]
    assert grad[b, t].tolist() == pytest.approx(expected["grad_row"], rel=1e-9, abs=1e-9)
    assert grad.abs().sum().item() == pytest.approx(expected["grad"]["abs_sum"], rel=1e-9, abs=1e-9)
    assert grad.square().sum().item() == pytest.approx(expected["grad"]["sq_sum"], rel=1e-9, abs=1e-9)

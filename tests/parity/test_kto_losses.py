"""KTO against the published formula in float64: values, gradients, the KL term, metrics, batches of one class."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.losses.kto import KTO_LOSSES, LOSSES_WITH_KL, desirable_nll, kto_metrics, reference_point
from tests.parity.sets import oracle
from tests.steps import labeled_rows, make_store, step_of

ORACLE = oracle("kto")
PAIRING = [case for case in ORACLE["cases"] if case["kind"] == "kl_pairing"]
LOSS = [case for case in ORACLE["cases"] if case["kind"] != "kl_pairing"]


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", LOSS, ids=lambda case: case["id"])
def test_kto_loss_its_gradient_and_metrics_are_the_formulas(case):
    inputs, kind, params, expected = ORACLE["inputs"][case["input"]], case["kind"], case["params"], case["expected"]
    numbers = {name: torch.tensor(inputs[name], dtype=torch.float64) for name in inputs if name.endswith("logps")}
    policy, desirable = numbers["policy_logps"].requires_grad_(), torch.tensor(inputs["label"]).bool()
    ratio, mismatched_ratio = policy - numbers["ref_logps"], numbers["policy_kl_logps"] - numbers["ref_kl_logps"]

    kl = reference_point(mismatched_ratio.sum(), len(ratio)) if kind in LOSSES_WITH_KL else torch.tensor(0.0).double()
    weights = {"desirable_weight": params["w_d"], "undesirable_weight": params["w_u"]}
    losses = KTO_LOSSES[kind](ratio, desirable, kl, beta=params["beta"], **weights)
    with_sft = losses + params.get("ftx", 0.0) * desirable_nll(policy, torch.tensor(inputs["lengths"]), desirable)
    with_sft.mean().backward()

    close(losses, expected["losses"])
    close(with_sft.mean(), expected["loss"])
    close(kl, expected["kl"])
    close(policy.grad, expected["grad_policy_logps"])
    close(params["beta"] * ratio, expected["rewards"])
    sums = kto_metrics(ratio, policy, desirable, kl, beta=params["beta"])
    metrics = {name: float(total / count) for name, (total, count) in sums.items() if count and not name.startswith("logps")}
    if metrics.keys() >= {"rewards/chosen", "rewards/rejected"}:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    assert metrics == pytest.approx(expected["metrics"], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("case", PAIRING, ids=lambda case: case["id"])
def test_kl_pairs_each_prompt_with_the_answer_before(case, tmp_path):
    rows = [([1, 2], [3, row]) for row in range(case["params"]["n"])]
    store = make_store(tmp_path, "labeled", labeled_rows(rows, [True] * len(rows)))
    (batch,) = step_of(store, max_length=8, packing=False, micro=len(rows)).batches
    assert list(batch.partners) == case["expected"]["completion_index_for_prompt"]

"""Whole steps of a tiny model against values computed in float64 from the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_llm.config.load import load_config
from raytune_llm.data.batches import collate
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models import attention
from raytune_llm.models.adapters import adapt
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.records import Batch
from tests.parity.sets import folder, oracle

FOLDER = folder("losses")


def cases(kind: str) -> list[Any]:
    everything = oracle("model_steps")["cases"]
    return [pytest.param(case, id=case["id"]) for case in everything if case["kind"].startswith(kind)]


def policy(backend: str) -> CausalLM:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "tiny_llama", dtype=torch.float32)
    attention.attach(model, backend)
    return CausalLM(model)


def documents(rows: list[tuple[list[int], list[int]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompts and completions as our rows of ids and spans."""
    return [
        (np.array(prompt + completion, np.int32), np.array([len(prompt), len(prompt) + len(completion)], np.int32))
        for prompt, completion in rows
    ]


def batches(rows: list[tuple[np.ndarray, np.ndarray]], layout: str) -> list[Batch]:
    if layout == "packed":
        return [collate([rows], length=sum(len(ids) for ids, _ in rows) + 7, pad_id=0)]
    return [collate([[row]], length=len(row[0]), pad_id=0) for row in rows]


@pytest.mark.parametrize("layout", ["packed", "one by one"])
@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
@pytest.mark.parametrize("case", cases("sft"))
def test_sft_step_has_the_reference_loss_and_gradients(case: dict[str, Any], backend: str, layout: str) -> None:
    model, expected = policy(backend), case["expected"]
    rows = documents(case["inputs"]["rows"])
    parts = batches(rows, layout)
    count = sum(len(batch.trained_N) for batch in parts)
    assert count == expected["num_target_tokens"]
    loss = sum(model(batch, cross_entropy).sum() for batch in parts) / count
    loss.backward()
    assert math.isclose(loss.item(), expected["loss"], rel_tol=2e-5)
    for name, wrong in (case.get("must_not_equal") or {}).items():
        assert not math.isclose(loss.item(), wrong, rel_tol=1e-4), name
    grads = {name: parameter.grad for name, parameter in model.base.named_parameters()}
    norm = torch.nn.utils.get_total_norm([grad for grad in grads.values() if grad is not None])
    assert math.isclose(norm.item(), expected["grad_norm"], rel_tol=2e-5)
    for name, reference in expected["grads"].items():
        grad = grads[name]
        assert grad is not None
        assert math.isclose(grad.abs().sum().item(), reference["abs_sum"], rel_tol=2e-5)
        assert torch.allclose(grad.flatten()[:5], torch.tensor(reference["first5"]), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("case", cases("adapter"))
def test_adapters_have_the_reference_logits(case: dict[str, Any]) -> None:
    kind = case["kind"].removeprefix("adapter_")
    settings = ["data.path=x", f"adapter={kind}", f"adapter.path={FOLDER}/adapter_{kind}_s{case['seed']}"]
    model = CausalLM(adapt(policy("varlen").base, load_config("train", settings).adapter).model)
    ids = np.array(case["inputs"]["input_ids"], np.int32).reshape(-1)
    batch = collate([[(ids, np.array([0, len(ids)], np.int32))]], length=len(ids), pad_id=0)
    with torch.no_grad():
        out = model(batch, lambda logits_NV, targets_N: logits_NV)
    expected = torch.tensor(case["expected"]["logits"]).reshape(len(ids), -1)[:-1]
    assert torch.allclose(out, expected, rtol=2e-5, atol=2e-5)

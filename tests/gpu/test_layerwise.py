"""Tensors that step within the backward pass on a GPU, while the host has still to hear whether their gradients are finite."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.config.load import load_config
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.ddp import DDPStrategy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)
SIZES = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256)


BAD = "model.model.layers.1.mlp.up_proj.weight"


def trained(name: str, *, layerwise: bool, breaks_at: int | None = None) -> DDPStrategy:
    """After three steps. breaks_at: the one in which the gradient of one tensor is not finite."""
    torch.manual_seed(0)
    policy = CausalLM(AutoModelForCausalLM.from_config(SIZES, dtype=torch.float32))
    section = load_config("train", ["data.path=x", f"optimizer={name}", "optimizer.lr=1e-2"]).optimizer
    training = Training(CUDA, torch.float32, max_grad_norm=None, layerwise=layerwise)
    strategy = DDPStrategy(policy, partial(build_optimizer, section), training)
    for number in range(3):
        broken = number == breaks_at
        hook = policy.get_parameter(BAD).register_hook(lambda gradient, broken=broken: gradient / (0 if broken else 1))
        with strategy.accumulate(last=True):
            logits = policy.base(torch.arange(16, device=CUDA)[None] + number).logits
            strategy.backward(logits.logsumexp(-1).mean(), 1e-2)
        assert bool(strategy.step(1e-2).skipped) == broken
        assert all(parameter.grad is None for parameter in policy.parameters())
        hook.remove()
    return strategy


@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon", "sgd"])
def test_steps_and_state_are_those_of_the_plain_update(name: str) -> None:
    layerwise = trained(name, layerwise=True)
    assert layerwise.layerwise is not None and layerwise.layerwise.behind == (0 if name == "adamw" else 2)
    expected, found = trained(name, layerwise=False).state(), layerwise.state()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_only_the_tensor_of_a_gradient_that_is_not_finite_stays(name: str) -> None:
    state = trained(name, layerwise=True, breaks_at=1).state()
    assert all(value.isfinite().all() for value in state.values())
    counts = {key: int(value) for key, value in state.items() if key.endswith(".step")}
    assert counts.pop(f"optimizer.{BAD}.step") == 2 and set(counts.values()) == {3}

"""Liger's layers give what transformers' give, and so do their gradients."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models import attention
from raytune_llm.models.adapters import PeftAdapters
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.liger import with_liger
from raytune_llm.train.loop import to_device
from tests.models import lora_section, packed, some_rows

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("liger_kernel") is None, reason="needs a GPU and the package liger-kernel"
)

CUDA = torch.device("cuda")
SIZES = {
    "vocab_size": 97, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 0,
}  # fmt: skip
LENGTHS = (3, 170, 55, 12)


def model(kind: str, adapter: str, dtype: torch.dtype, *, liger: bool) -> CausalLM:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), dtype=torch.float32)
    for name, value in base.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(value, mean=value.mean().item(), std=0.2)
    attention.attach(base, "sdpa")
    adapters = PeftAdapters(base)
    if adapter == "lora":
        adapters.add_own(lora_section())
        for name, value in base.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.05)
    base.to(CUDA)
    if liger:
        with_liger(base, "cuda")
    return CausalLM(adapters.model, adapters=adapters, compute=dtype, attention_backend="sdpa").to(CUDA).train()


def steps(policy: CausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients, two micro-batches of them."""
    for seed in (0, 1):
        batch = to_device(packed(some_rows(LENGTHS, seed=seed)), CUDA)
        losses = policy(batch, cross_entropy)
        losses.sum().backward()
    return losses.detach().float(), {
        name: value.grad.float() for name, value in policy.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_losses_and_gradients_are_those_of_transformers_layers(kind: str, adapter: str) -> None:
    losses, gradients = steps(model(kind, adapter, torch.float32, liger=True))
    expected, theirs = steps(model(kind, adapter, torch.float32, liger=False))
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_in_bf16_they_are_as_near_to_float32_as_transformers_layers(kind: str) -> None:
    exact, _ = steps(model(kind, "none", torch.float32, liger=False))
    liger, plain = (steps(model(kind, "none", torch.bfloat16, liger=chosen))[0] for chosen in (True, False))
    assert (liger - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-3


def test_other_models_of_the_process_keep_their_layers() -> None:
    plain = model("llama", "none", torch.float32, liger=False)
    kinds = [type(module) for module in plain.modules()]
    before, _ = steps(copy.deepcopy(plain))
    model("llama", "none", torch.float32, liger=True)
    assert [type(module) for module in plain.modules()] == kinds
    assert torch.equal(steps(plain)[0], before)

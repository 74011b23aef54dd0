"""Packed layers compute what the layers that they replace did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.few_rows import FewRows, FewRowsLinear
from raytune_llm.models.layers import layers
from raytune_llm.models.onednn import OneDNN, OneDNNLinear
from raytune_llm.models.packed import PackedPart, Packing, pack

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(OneDNN.lacks(CPU, torch.bfloat16) is not None, reason="oneDNN has no bf16 here")
CONFIG = Qwen2Config(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # q, k and v have biases


LENGTHS = (1, 5, 40)


@torch.no_grad()
def logits_of(model: Any, *, packing: type[Packing] | None) -> list[torch.Tensor]:
    """Of texts of LENGTHS, with no adapter and with one."""
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.bfloat16)
    for number, layer in enumerate(bank._layers.values()):
        torch.manual_seed(number)
        layer.a_GRK[:2].normal_()
        layer.b_GRO[:2].normal_(std=0.1)
    if packing is not None:
        pack(layers(model), packing)
    if packing is not None and packing.joins_adapters:
        bank.join()
        assert {len(layer.joined.sizes) for layer in bank._layers.values() if layer.joined} == {2, 3}
    found = []
    for length in LENGTHS:
        ids = torch.arange(length)[None] % 97
        route = bank.by_documents(torch.tensor([1]), torch.tensor([0, length]), length)
        found += [model(ids).logits, model(ids, **route).logits]
    of_tokens = bank.by_tokens(torch.tensor([1, -1, 0, 1]))
    found.append(model(torch.arange(4)[None], **of_tokens).logits)
    bank.clear(1)
    found.append(model(torch.arange(4)[None], **of_tokens).logits)
    return found


@pytest.mark.parametrize(("packing", "made"), [pytest.param(OneDNN, OneDNNLinear, marks=needs_onednn), (FewRows, FewRowsLinear)])
def test_a_packed_model_computes_the_same(packing, made):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            parameter.detach().normal_()
    packed = copy.deepcopy(plain)
    torch.testing.assert_close(logits_of(packed, packing=packing), logits_of(plain, packing=None), atol=0.05, rtol=0.05)
    kinds = {type(module) for layer in layers(packed) for module in layer.modules()}
    assert {made, PackedPart} <= kinds and torch.nn.Linear not in kinds

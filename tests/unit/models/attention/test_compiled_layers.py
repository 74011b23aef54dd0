"""Layers that are alike are one layer to the compiler: it compiles once, however many they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.data.batches import collate
from raytune_llm.models import attention
from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.layers import layers

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def graphs(kind: str, number: int, *, banked: bool) -> int:
    """Graphs that are compiled for a pass through so many layers."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=number, **SIZES))
    attention.attach(model, "varlen")
    if banked:
        LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32)
    torch._dynamo.reset()
    counters.clear()
    for layer in layers(model):
        layer.compile(backend="eager")
    ids = np.arange(20, dtype=np.int32)
    batch = collate([[(ids[:12], ids[:0]), (ids[:8], ids[:0])]], length=20, pad_id=0)
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        CausalLM(model).hidden(batch)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo2", "granite", "phi3"])
def test_more_layers_are_no_more_graphs(kind, banked):
    assert graphs(kind, 12, banked=banked) == graphs(kind, 24, banked=banked)

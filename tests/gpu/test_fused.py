"""The kernels of long steps beside the modules that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.models import attention
from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.adapters.routes import BySlot
from raytune_llm.models.attention.cache import CachedRows, NewTokens
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.few_rows import FewRows
from raytune_llm.models.fused import FusedNorm, fuse, gated, rotate
from raytune_llm.models.layers import layers
from raytune_llm.models.packed import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA, BFLOAT16 = torch.device("cuda"), torch.bfloat16
CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)


def error(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("width", [64, 1030, 4096, 16384])
def test_a_norm_is_its_module_s(width):
    torch.manual_seed(0)
    x, plain = torch.randn(1, 300, width, device=CUDA, dtype=BFLOAT16), LlamaRMSNorm(width).to(CUDA)
    torch.nn.init.normal_(plain.weight)
    got = FusedNorm(plain)(x)
    assert got.dtype == BFLOAT16
    assert error(got, plain(x.float())) < 5e-3


@pytest.mark.parametrize(("heads", "keys", "head"), [(32, 8, 128), (5, 1, 80)])
def test_rotary_positions_are_transformers(heads, keys, head):
    torch.manual_seed(0)
    whole = torch.randn(1, 300, (heads + 2 * keys) * head, device=CUDA, dtype=BFLOAT16)
    parts = whole.clone().split([heads * head, keys * head, keys * head], dim=-1)
    query, key, value = (x.view(1, 300, -1, head).transpose(1, 2) for x in parts)
    cos, sin = (torch.randn(1, 300, head, device=CUDA, dtype=BFLOAT16) for _ in range(2))
    expected = apply_rotary_pos_emb(query.float(), key.float(), cos.float(), sin.float())
    for got, wanted in zip(rotate(query, key, cos, sin), expected, strict=True):
        assert error(got, wanted) < 5e-3
    assert torch.equal(value.transpose(1, 2).flatten(2), whole[..., -keys * head :])


def test_gated_columns_of_one_tensor_are_silu_times_up():
    torch.manual_seed(0)
    gate, up = torch.randn(1, 300, 2 * 1500, device=CUDA, dtype=BFLOAT16).split(1500, dim=-1)
    assert error(gated(gate, up), F.silu(gate.float()) * up.float()) < 5e-3


@torch.no_grad()
def test_a_long_step_of_several_adapters_with_these_kernels_is_the_step_without_them():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=BFLOAT16).to(CUDA)
    attention.attach(model, "varlen")
    policy = CausalLM(model, compute=BFLOAT16)
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=BFLOAT16)
    for layer in bank._layers.values():
        layer.a_GRK[:2].normal_(std=0.1)
        layer.b_GRO[:2].normal_(std=0.1)
    runner = PolicyRunner(policy, num_blocks=100, block_size=16, device=CUDA, bank=bank)
    lengths, slots = (700, 300, 200), (1, -1, 0)
    blocks = (list(range(44)), list(range(44, 63)), list(range(63, 76)))
    new = [NewTokens(torch.randint(0, 512, (length,)).tolist(), 0, own) for length, own in zip(lengths, blocks, strict=True)]

    def computed() -> Tensor:
        route = runner._route(slots, lengths)
        assert isinstance(next(iter(route.values())), BySlot)
        return policy.hidden(CachedRows.of(runner._cache, new), route)[0]

    plain = computed()
    pack(layers(model), FewRows)
    fuse(model)
    assert sum(isinstance(part, FusedNorm) for part in model.modules()) == 7
    assert error(computed(), plain) < 2e-2

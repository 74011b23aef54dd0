"""Packed layers compute what the layers that they replace did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config

from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.adapters.bank import ROUTE
from raytune_llm.models.adapters.bank_weights import PREFIX, A, B
from raytune_llm.models.adapters.banked import banked
from raytune_llm.models.adapters.packs import COLUMNS, Packed
from raytune_llm.models.adapters.routes import InTurn, Masked, Route
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


def load(bank: LoraBank, slot: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in bank._layout.sizes.items():
        tensors[PREFIX + name + A], tensors[PREFIX + name + B] = torch.randn(rank, inputs), torch.randn(outputs, rank) / 10
    bank.load(slot, bank._layout.arranged(LoraConfig(r=rank, lora_alpha=rank), tensors))


@torch.no_grad()
def logits_of(model: Any, *, packing: type[Packing] | None) -> list[torch.Tensor]:
    """Of texts of LENGTHS, with no adapter and with one."""
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.bfloat16)
    for slot, rank in enumerate((8, 3)):
        load(bank, slot, rank, seed=slot)
    if packing is not None:
        pack(layers(model), packing)
    if packing is not None and packing.joins_adapters:
        bank.join()
        assert {len(layer.joined.sizes) for layer in bank._layers.values() if layer.joined} == {1, 2, 3}
    found = []
    for length in LENGTHS:
        ids = torch.arange(length)[None] % 97
        route = bank.by_documents(torch.tensor([1]), torch.tensor([0, length]), length)
        found += [model(ids).logits, model(ids, **route).logits]
    for cleared in (False, True):
        if cleared:
            bank.clear(1)
        found.append(model(torch.arange(4)[None], **bank.by_tokens(torch.tensor([1, -1, 0, 1]))).logits)
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


@needs_onednn
@torch.no_grad()
def test_rows_that_decode_take_packs_of_slots_and_are_what_the_masked_product_makes_of_them():
    """Of any ranks, after a slot got another adapter, and beside a prompt."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()
    bank = LoraBank(model, num_slots=5, max_rank=64, dtype=torch.bfloat16)
    pack(layers(model), OneDNN)
    bank.join()
    for slot, rank in enumerate((8, 5, 40, 30)):
        load(bank, slot, rank, seed=slot)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    sharing = (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )
    inputs = [torch.randn(1, 11, group[0].a_GRK.shape[2], dtype=torch.bfloat16) for group in sharing]
    slots = torch.tensor([2, -1, 3, 0, 4, 3, 0])  # the last slot is empty

    def outputs(route: Route | None, length: int = 7) -> list[torch.Tensor]:
        bank._now.route = route
        return [torch.cat(banked(x[:, :length], group), -1) for x, group in zip(inputs, sharing, strict=True)]

    def check(number_of_packs: int) -> None:
        packed = bank.by_tokens(slots)[ROUTE]
        assert isinstance(packed, Packed) and len(packed.packs) == number_of_packs
        assert all(len(one.slot_C) <= COLUMNS for one in packed.packs)
        beside = bank.by_documents(torch.tensor([*slots, 2]), torch.tensor([0, *range(1, 8), 11]), 11)[ROUTE]
        assert isinstance(beside, InTurn) and isinstance(beside.first, Packed)
        masked = Masked.of(slots, bank.num_slots, torch.bfloat16)
        for found, wanted, bare, mixed in zip(outputs(packed), outputs(masked), outputs(None), outputs(beside, 11), strict=True):
            torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.02)
            torch.testing.assert_close(mixed[:, :7], wanted, atol=0.05, rtol=0.02)
            assert torch.equal(found[:, slots < 0], bare[:, slots < 0]) and torch.equal(found[:, slots == 4], bare[:, slots == 4])
            assert ((found - bare).abs().amax(-1) > 0.5).sum() == 5

    check(2)
    load(bank, 0, 8, seed=9)
    check(2)
    load(bank, 1, 20, seed=1)
    check(3)
    bank.clear(2)
    load(bank, 2, 2, seed=2)
    check(1)

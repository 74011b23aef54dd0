"""Layers between tensors that stay where they are give the gradients that they give as they are written. Here without graphs,
which CPUs have not; tests/gpu has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.models import attention
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.layer_graphs import MAX_SHAPES, with_spare_documents
from raytune_llm.records import Batch
from raytune_llm.train.dropout import seed_dropout
from tests.models import VOCABULARY, packed, some_rows

SHAPES = ((9, 12), (9, 12), (20, 1), (5, 4, 3, 2, 4, 3), (9, 12, 9, 12))


def policy(*, lora: bool, dropout: float = 0.0, **settings: Any) -> CausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attention.attach(model, "varlen")
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return CausalLM(model, **settings).train()


def batches() -> list[Batch]:
    return [packed(some_rows(lengths, seed=number)) for number, lengths in enumerate(SHAPES)]


def loss(policy: CausalLM, batch: Batch) -> Tensor:
    return policy(batch, lambda logits_NV, targets_N: F.cross_entropy(logits_NV, targets_N, reduction="none")).sum()


def gradients(policy: CausalLM) -> list[Tensor]:
    return [one.grad for one in policy.parameters() if one.grad is not None]


def each(policy: CausalLM, batches: Sequence[Batch]) -> None:
    for batch in batches:
        seed_dropout(batch)
        loss(policy, batch).backward()


def two_at_once(policy: CausalLM, batches: Sequence[Batch]) -> None:
    (loss(policy, batches[0]) - 2 * loss(policy, batches[1])).backward()
    each(policy, batches[2:])


def one_without_gradients(policy: CausalLM, batches: Sequence[Batch]) -> None:
    unused = loss(policy, batches[0])
    del unused
    each(policy, batches)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("step", [each, two_at_once, one_without_gradients])
def test_gradients_are_those_of_layers_as_they_are_written(step: Callable, lora: bool):
    plain, graphed = policy(lora=lora), policy(lora=lora, cuda_graphs=True)
    for _ in range(2):
        step(plain, batches())
        step(graphed, batches())
        for ours, theirs in zip(gradients(graphed), gradients(plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for model in (plain, graphed):
            model.zero_grad(set_to_none=True)


def test_dropout_is_that_of_layers_as_they_are_written():
    plain, graphed = policy(lora=True, dropout=0.5), policy(lora=True, dropout=0.5, cuda_graphs=True)
    each(plain, batches())
    each(graphed, batches())
    for ours, theirs in zip(gradients(graphed), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_parameters_at_other_places_are_followed():
    plain, graphed = policy(lora=True), policy(lora=True, cuda_graphs=True)
    for model in (plain, graphed):
        each(model, batches())
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
        each(model, batches())
    for ours, theirs in zip(gradients(graphed), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_shapes_beyond_the_limit_are_computed_too():
    plain, graphed = policy(lora=True), policy(lora=True, cuda_graphs=True)
    many = [packed(some_rows((length, length))) for length in range(3, MAX_SHAPES + 6)]
    each(plain, many)
    each(graphed, many)
    for ours, theirs in zip(gradients(graphed), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_spare_documents_have_no_tokens_and_come_in_few_numbers():
    found = {number: with_spare_documents(packed(some_rows([3] * number))) for number in (1, 8, 9, 16, 17)}
    assert [len(batch.cu_seqlens_S) - 1 for batch in found.values()] == [8, 8, 16, 16, 32]
    assert all(batch.cu_seqlens_S.max() == 3 * number == batch.cu_seqlens_S[-1] for number, batch in found.items())

"""With a cache as without: hidden states of rows that are computed in pieces are those of the whole rows."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from raytune_llm.errors import ConfigError
from raytune_llm.models import attention
from raytune_llm.models.attention.cache import CachedRows, NewTokens, PagedCache, check_cached
from raytune_llm.models.causal_lm import CausalLM
from tests.models import VOCABULARY, packed, some_rows

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "grouped heads": LlamaConfig(**SIZES),
    "a head a key": LlamaConfig(**(SIZES | {"num_key_value_heads": 4})),
    "a window": MistralConfig(**SIZES, sliding_window=7),
    "norms of heads": Qwen3Config(**SIZES),
    "capped scores, and a window in every second layer": Gemma2Config(**SIZES, sliding_window=6),
}
BLOCK, BLOCKS = 4, 12
"""Tokens a block, and blocks a row."""


def policy_of(config: PretrainedConfig) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attention.attach(model, "varlen")
    return CausalLM(model).eval()


def new_cache(rows: int) -> PagedCache:
    return PagedCache(rows * BLOCKS, BLOCK, dtype=torch.float32, device=torch.device("cpu"))


def in_pieces(policy: CausalLM, rows: list[list[int]], draw: random.Random, sizes: list[int]) -> list[torch.Tensor]:
    """The rows' hidden states, computed by steps that take the next so many tokens of each row, or none."""
    cache = new_cache(len(rows))
    numbers = draw.sample(range(cache.num_blocks), cache.num_blocks)
    tables = [numbers[row * BLOCKS : (row + 1) * BLOCKS] for row in range(len(rows))]
    done, found = [0] * len(rows), [[] for _ in rows]
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        new = {number: min(draw.choice(sizes), len(row) - done[number]) for number, row in enumerate(rows)}
        order = sorted((number for number in new if new[number]), key=lambda number: new[number] > 1)
        if not order:
            continue
        step = CachedRows.of(
            cache,
            [NewTokens(rows[n][done[n] : done[n] + new[n]], done[n], tables[n]) for n in order],
        )
        hidden_LD = policy.hidden(step)[0]
        for number, part in zip(order, hidden_LD.split([new[number] for number in order]), strict=True):
            found[number].append(part)
            done[number] += new[number]
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1], [0, 1, 1, 2, 9], [40]], ids=["a token a step", "mixed steps", "whole rows"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_in_pieces_are_computed_as_whole_rows_are(name: str, sizes: list[int]):
    policy, rows = policy_of(CONFIGS[name]), some_rows([9, 33, 17, 1, 24])
    pieces = in_pieces(policy, [ids.tolist() for ids, _ in rows], random.Random(0), sizes)
    for row, found in zip(rows, pieces, strict=True):
        torch.testing.assert_close(found, policy.hidden(packed([row]))[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_is_computed_alike_whatever_a_block_held_before():
    policy, rows = policy_of(CONFIGS["a window"]), some_rows([30, 20], seed=1)
    cache = new_cache(1)
    [first], [second] = ([NewTokens(ids.tolist(), 0, range(BLOCKS))] for ids, _ in rows)
    policy.hidden(CachedRows.of(cache, [first]))
    found = policy.hidden(CachedRows.of(cache, [second]))
    torch.testing.assert_close(found, policy.hidden(packed([rows[1]])), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_sinks_are_those_of_transformers():
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
    policy = policy_of(GptOssConfig(**sizes, layer_types=["sliding_attention", "full_attention", "sliding_attention"]))
    for layer in policy.base.base_model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    rows = [ids.tolist() for ids, _ in some_rows([9, 33, 17])]
    pieces = in_pieces(policy, rows, random.Random(0), [1, 5])
    policy.base.set_attn_implementation("eager")
    for row, found in zip(rows, pieces, strict=True):
        whole = policy.base.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
        torch.testing.assert_close(found, whole[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_holds_what_each_layer_computes():
    policy = policy_of(CONFIGS["grouped heads"])
    cache = new_cache(1)
    assert cache.bytes_a_token == 0
    policy.hidden(CachedRows.of(cache, [NewTokens([1, 2], 0, [5])]))
    assert sorted(cache.layers) == [0, 1, 2]
    assert cache.layers[0][0].shape == (BLOCKS, BLOCK, 2, 8)
    assert cache.bytes_a_token == policy.cache_bytes_a_token() == 3 * 2 * 2 * 8 * 4


def test_a_model_whose_layers_carry_more_than_keys_and_values_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"engine can't be native for qwen3_next, .*linear_attention.*"):
        check_cached(Qwen3NextConfig())

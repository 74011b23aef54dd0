"""With a cache as without: hidden states of rows that are computed in pieces equal those of the whole row."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.errors import ConfigError
from raytune_llm.models import attention
from raytune_llm.models.attention.cache import check_cached
from raytune_llm.models.causal_lm import CausalLM
from tests.models import packed

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "a window": MistralConfig(**SIZES, sliding_window=7),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "capped scores, a window in every second layer": Gemma2Config(**SIZES, head_dim=8, sliding_window=6),
}


def policy_of(config) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attention.attach(model, "varlen")
    return CausalLM(model).eval()


class Row:
    """As much of a row as a runner sees."""

    slot = -1

    def __init__(self, ids: list[int], blocks: list[int]) -> None:
        self.ids, self.blocks = ids, blocks


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_in_pieces_of_any_size_equal_whole_rows(name: str):
    policy, draw = policy_of(CONFIGS[name]), random.Random(0)
    runner = PolicyRunner(policy, num_blocks=40, block_size=4, device=torch.device("cpu"))
    numbers = list(range(40))
    draw.shuffle(numbers)
    rows, done = [], []
    for number in range(4):
        ids = [draw.randrange(97) for _ in range(draw.randrange(9, 34))]
        rows.append(Row(ids, numbers[10 * number : 10 * number + 10]))
        done.append(0)
    wholes = [policy.logits(policy.hidden(packed([(torch.tensor(row.ids).int().numpy(), torch.tensor([0, 1]).numpy())]))[0])
              for row in rows]  # fmt: skip
    while any(at < len(row.ids) for at, row in zip(done, rows, strict=True)):
        pieces = []
        for number, row in enumerate(rows):
            size = min(draw.choice([0, 1, 1, 2, 9]), len(row.ids) - done[number])
            if size:
                pieces.append(_Piece(row, done[number], done[number] + size))
                done[number] += size
        if not pieces:
            continue
        logits = runner.run(pieces)
        for piece, values in zip(pieces, logits, strict=True):
            torch.testing.assert_close(values, wholes[rows.index(piece.row)][piece.stop - 1], rtol=1e-4, atol=1e-5)


class _Piece:
    samples = True

    def __init__(self, row: Row, start: int, stop: int) -> None:
        self.row, self.start, self.stop = row, start, stop

    def __iter__(self):
        return iter((self.row, self.start, self.stop))


def test_models_that_carry_more_than_keys_and_values_are_refused_by_name():
    from transformers import DeepseekV3Config, Qwen3NextConfig

    for config in (Qwen3NextConfig(), DeepseekV3Config()):
        with pytest.raises(ConfigError, match=r"engine can't be native for .* engine=hf"):
            check_cached(config)

"""A policy in an engine's steps: logits of rows in pieces are those of whole rows."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.models import attention
from raytune_llm.models.causal_lm import CausalLM
from tests.models import packed, some_rows

BLOCKS = 10
"""Of a row."""
CONFIG = MistralConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    sliding_window=7,
)


class Row:
    """As much of a row as a runner sees."""

    slot = -1

    def __init__(self, ids: list[int], blocks: list[int]) -> None:
        self.ids, self.blocks = ids, blocks


class Piece:
    samples = True

    def __init__(self, row: Row, start: int, stop: int) -> None:
        self.row, self.start, self.stop = row, start, stop

    def __iter__(self):
        return iter((self.row, self.start, self.stop))


@torch.no_grad()
@pytest.mark.parametrize("left_behind", [0.0, math.nan, math.inf])
def test_logits_come_in_the_order_of_the_pieces(left_behind: float):
    """left_behind: what other rows left in the cache, such as those of an adapter with damaged weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    attention.attach(model, "varlen")
    policy, draw = CausalLM(model).eval(), random.Random(0)
    stored = some_rows([33, 9, 20, 27])
    runner = PolicyRunner(policy, num_blocks=BLOCKS * len(stored), block_size=4, device=torch.device("cpu"))
    numbers = draw.sample(range(runner.num_blocks), runner.num_blocks)
    rows = [Row(ids.tolist(), numbers[BLOCKS * n : BLOCKS * (n + 1)]) for n, (ids, _) in enumerate(stored)]
    wholes = [policy.logits(policy.hidden(packed([row]))[0]) for row in stored]
    runner.run([Piece(rows[0], 0, 1)])  # type: ignore[list-item]  # so that the cache is made
    for held in runner._cache.layers.values():
        for one in held:
            one.fill_(left_behind)
    done = [0] * len(rows)
    while any(at < len(row.ids) for at, row in zip(done, rows, strict=True)):
        pieces: list[Any] = []
        for number, row in enumerate(rows):
            size = min(draw.choice([0, 1, 1, 2, 9]), len(row.ids) - done[number])
            if size:
                pieces.append(Piece(row, done[number], done[number] + size))
                done[number] += size
        for piece, found in zip(pieces, runner.run(pieces) if pieces else [], strict=True):
            torch.testing.assert_close(found, wholes[rows.index(piece.row)][piece.stop - 1], rtol=1e-4, atol=1e-5)

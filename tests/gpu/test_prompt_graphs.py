"""Captured steps of prompts beside steps as they are written: the same logits, and the same keys and values for what follows."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.engines.native.graphs import DecodeGraphs
from raytune_llm.engines.native.row import Row
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.engines.native.sampler import RowSampler
from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.engines.native.text import TextStream
from raytune_llm.engines.requests import Sampling, Stream
from raytune_llm.models import attention
from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.few_rows import FewRows
from raytune_llm.models.layers import layers
from raytune_llm.models.packed import pack
from tests.invariant.test_served_equals_trained import Tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA, SIZE = torch.device("cuda"), 16
CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)


def row(ids: list[int], blocks: list[int], slot: int) -> Row:
    sampling = Sampling(max_new_tokens=4)
    text = TextStream(Tokenizer(), ())
    made = Row(Stream(), sampling, RowSampler(sampling, (), ids), text, list(ids), len(ids), len(ids) + 4, slot=slot)
    made.blocks = blocks
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("slots", [(-1, -1, -1), (1, -1, 0)])
def test_captured_prompts_equal_those_as_written(slots, packed):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=torch.bfloat16).to(CUDA)
    attention.attach(model, "varlen")
    policy = CausalLM(model, compute=torch.bfloat16)
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.bfloat16)
    for number, layer in enumerate(bank._layers.values()):
        torch.manual_seed(number)
        layer.a_GRK[:2].normal_(std=0.1)
        layer.b_GRO[:2].normal_(std=0.1)
    if packed:
        pack(layers(model), FewRows)
    made = partial(DecodeGraphs, policy, bank=bank, max_rows=8, max_length=512, compiled=True)
    runner = PolicyRunner(policy, num_blocks=100, block_size=SIZE, device=CUDA, bank=bank, graphs=made)
    assert runner._prompts is not None
    free = torch.randperm(100).tolist()
    lengths = (5, 130, 64)
    rows = [
        row(torch.randint(0, 512, (length,)).tolist(), [free.pop() for _ in range(-(-(length + 1) // SIZE))], slot)
        for length, slot in zip(lengths, slots, strict=True)
    ]
    pieces = [Piece(one, 0, len(one.ids)) for one in rows]
    assert runner._prompts.takes(pieces)
    with torch.no_grad():
        expected = runner._as_written(pieces).clone()
        written = [part.clone() for part in runner._cache.whole()]
        for part in runner._cache.whole():
            part.zero_()
        got = runner.run(pieces).clone()
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
        places = [
            block * SIZE + at
            for one in rows
            for at, block in ((n % SIZE, one.blocks[n // SIZE]) for n in range(one.prompt_tokens))
        ]
        for part, before in zip(runner._cache.whole(), written, strict=True):
            torch.testing.assert_close(part.flatten(1, 2)[:, places], before.flatten(1, 2)[:, places], rtol=2e-2, atol=2e-2)
        # A step of rows that decode beside a new prompt.
        tokens = expected.argmax(1)
        assert runner.sampled is not None
        runner.sampled(tokens[:2])
        for number, one in enumerate(rows[:2]):
            one.ids.append(-1 - number)
        third = Piece(rows[2], 0, len(rows[2].ids))
        mixed = runner.run([*(Piece(one, len(one.ids) - 1, len(one.ids)) for one in rows[:2]), third]).clone()
        for number, one in enumerate(rows[:2]):
            one.ids[-1] = int(tokens[number])
        plain = runner._as_written([*(Piece(one, len(one.ids) - 1, len(one.ids)) for one in rows[:2]), third])
        torch.testing.assert_close(mixed, plain, rtol=2e-2, atol=3e-2)

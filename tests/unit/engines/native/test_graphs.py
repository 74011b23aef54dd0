"""Steps of fixed shapes for rows that decode, without the graphs that hold them on a GPU, beside steps as they are written."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, LlamaConfig, MistralConfig, MixtralConfig

from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.graphs import DecodeGraphs, lacks_for_graphs
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.models import attention
from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.causal_lm import CausalLM
from tests.invariant.test_served_equals_trained import CONFIG, Tokenizer, save_adapter

WINDOWED = MistralConfig(
    vocab_size=101, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, sliding_window=9, max_position_embeddings=256,
)  # fmt: skip


def answers(
    config: LlamaConfig | MistralConfig, adapters: dict[str, str], *, graphs: bool, overlaps: bool = False
) -> list[tuple[int, ...]]:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    attention.attach(model, "varlen")
    policy = CausalLM(model)
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32) if adapters else None
    made = partial(DecodeGraphs, policy, bank=bank, max_rows=6, max_length=64, compiled=False, captured=False)
    runner = PolicyRunner(
        policy, num_blocks=60, block_size=4, device=torch.device("cpu"), bank=bank, graphs=made if graphs else None
    )
    engine = NativeEngine(runner, Tokenizer(), end_ids=(), max_length=64, max_rows=6, threaded=False, overlaps=overlaps)
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    names = [None, *adapters] * 3
    requests = [
        Request(prompt_ids=[5 + number, 9, 40] * (1 + number), adapter=name, sampling=Sampling(max_new_tokens=9 + number))
        for number, name in enumerate(names[:5])
    ]
    found = [completion.ids for completion in engine.generate(requests)]
    engine.close()
    return found


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["llama", "windowed"])
def test_steps_of_fixed_shapes_give_the_same_tokens(config):
    assert answers(config, {}, graphs=True) == answers(config, {}, graphs=False)


def test_text_that_is_made_beside_the_next_step_is_the_same():
    assert answers(CONFIG, {}, graphs=True, overlaps=True) == answers(CONFIG, {}, graphs=False)


def test_adapters_too(tmp_path):
    folders = {name: str(save_adapter(tmp_path / name, rank, seed=rank)) for name, rank in (("a", 4), ("b", 8))}
    found = answers(CONFIG, folders, graphs=True)
    assert found == answers(CONFIG, folders, graphs=False)
    assert found[:2] != answers(CONFIG, {}, graphs=False)[:2]


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        (CONFIG, None),
        (WINDOWED, None),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "rotary tables change"),
        (MixtralConfig(), "experts"),
        (GptOssConfig(), "experts"),
        (DeepseekV3Config(), "experts"),
    ],
)
def test_what_a_graph_can_not_hold_runs_as_it_is_written(config, lacking):
    found = lacks_for_graphs(config)
    assert found is None if lacking is None else lacking in found

"""Models that the paged cache can't hold, served: the same answers as transformers' generate with the single adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Lfm2Config, LlamaConfig, MambaConfig, Qwen3NextConfig

from raytune_llm import ConfigError, load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.errors import UserError
from raytune_llm.serve.engines import build_engine

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "lfm2": Lfm2Config(**SMALL, **HEADS, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "mamba": MambaConfig(**SMALL, state_size=8),
    "qwen3_next": Qwen3NextConfig(
        **SMALL, **HEADS, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
}  # fmt: skip
TARGETS = {"llama": ["q_proj", "down_proj"], "lfm2": ["q_proj", "w1"], "mamba": ["in_proj"], "qwen3_next": ["o_proj", "out_proj"]}
PROMPTS = [[5, 6, 7, 8, 9], [40, 41], [7] * 23, [5, 6, 7, 1]]


def base_model(name: str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def save_base(name: str, folder: Path) -> Path:
    base_model(name).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(name: str, folder: Path, seed: int, config: Any = None) -> Path:
    config = config or LoraConfig(r=4, target_modules=TARGETS[name], task_type="CAUSAL_LM")
    adapted = get_peft_model(base_model(name), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key or "oft_R" in key:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


def engine_of(folder: Path, **adapters: Path):
    named = ", ".join(f"{name}: {path}" for name, path in adapters.items())
    settings = ["engine=hf", "model=hub", f"model.path={folder}", "serve.precision=fp32", "serve.max_adapters=2"]
    run = load_config("serve", [*settings, "serve.max_length=100", f"serve.adapters={{{named}}}"])
    return build_engine(run.model, run.quantization, run.engine, run.serve)[0]


def expected(name: str, adapter: Path | None, prompt: list[int], tokens: int) -> list[int]:
    model = base_model(name) if adapter is None else PeftModel.from_pretrained(base_model(name), str(adapter)).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_several_adapters_are_what_each_would_be_alone(name: str, tmp_path: Path):
    folder = save_base(name, tmp_path / "base")
    adapters = {f"a{seed}": save_adapter(name, tmp_path / f"a{seed}", seed) for seed in (1, 2, 3)}
    engine = engine_of(folder, **adapters)
    try:
        asked = [(prompt, adapter) for prompt in PROMPTS for adapter in (None, *adapters)]
        sampling = Sampling(max_new_tokens=6, ignore_end=True, logprobs=0)
        told = engine.generate([Request(prompt_ids=prompt, adapter=name, sampling=sampling) for prompt, name in asked])
        answers = {(*prompt, adapter): list(one.ids) for (prompt, adapter), one in zip(asked, told, strict=True)}
        for prompt, adapter in asked:
            assert answers[(*prompt, adapter)] == expected(name, adapters.get(adapter), prompt, 6), adapter
        assert len({one.logprobs[0].logprob for one in told[: 1 + len(adapters)]}) == 1 + len(adapters), "they differ"
        assert {one.residency for one in engine.adapters()} == {"device", "host"}
    finally:
        engine.close()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["dora", "oft"],
)
def test_adapters_that_can_not_be_mixed_are_served(config: Any, tmp_path: Path):
    folder = save_base("llama", tmp_path / "base")
    adapter = save_adapter("llama", tmp_path / "a", 1, config)
    engine = engine_of(folder, a=adapter)
    try:
        sampling = Sampling(max_new_tokens=6, ignore_end=True)
        [told] = engine.generate([Request(prompt_ids=PROMPTS[0], adapter="a", sampling=sampling)])
        assert list(told.ids) == expected("llama", adapter, PROMPTS[0], 6)
    finally:
        engine.close()


def altered(folder: Path, changed: dict[str, Any]) -> Path:
    """An adapter whose config says something else than its weights."""
    config = save_adapter("llama", folder, 1) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    return folder


def test_a_bad_adapter_is_refused_and_the_engine_goes_on(tmp_path: Path):
    folder = save_base("llama", tmp_path / "base")
    engine = engine_of(folder)
    try:
        other = save_adapter("mamba", tmp_path / "other", 1)
        truncated = save_adapter("llama", tmp_path / "cut", 1)
        weights = truncated / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        changed = [
            {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}, {"target_modules": ["nothing"]}, {"lora_alpha": "x"},
            {"r": 10**30}, {"layers_to_transform": [0]}, {"megatron_config": {"a": 1}}, {"layer_replication": [[0, 2], [0, 2]]},
            {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
        ]  # fmt: skip
        for bad in (other, truncated, tmp_path / "nothing", *(altered(tmp_path / str(n), one) for n, one in enumerate(changed))):
            with pytest.raises(UserError, match=str(bad)):
                engine.add_adapter("bad", bad)
        good = save_adapter("llama", tmp_path / "good", 1)
        engine.add_adapter("good", good)
        sampling = Sampling(max_new_tokens=4, ignore_end=True)
        [told] = engine.generate([Request(prompt_ids=PROMPTS[1], adapter="good", sampling=sampling)])
        assert list(told.ids) == expected("llama", good, PROMPTS[1], 4)
        assert [one.name for one in engine.adapters()] == ["good"]
    finally:
        engine.close()


def test_the_native_engine_names_this_one_where_it_can_not_serve(tmp_path: Path):
    folder = save_base("mamba", tmp_path / "base")
    run = load_config("serve", ["model=hub", f"model.path={folder}", "serve.precision=fp32"])
    with pytest.raises(ConfigError, match="engine=hf"):
        build_engine(run.model, run.quantization, run.engine, run.serve)

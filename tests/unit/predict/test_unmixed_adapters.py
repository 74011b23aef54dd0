"""Adapters that no batch mixes with others: the default engine answers with one as engine=hf does, or names the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune_llm import ConfigError
from raytune_llm.models.onednn import OneDNN
from raytune_llm.predict.run import predict

Q, MLP = ["q_proj", "v_proj"], ["down_proj"]
KINDS: dict[str, Any] = {
    "dora": LoraConfig(r=4, target_modules=[*Q, *MLP], use_dora=True, task_type="CAUSAL_LM"),
    "oft": OFTConfig(r=0, oft_block_size=8, target_modules=[*Q, *MLP], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=[*Q, *MLP], feedforward_modules=MLP, task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=4, target_modules=Q, task_type="CAUSAL_LM"),
    "whole head": LoraConfig(r=4, target_modules=Q, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "embeddings": LoraConfig(r=4, target_modules=[*Q, "embed_tokens"], task_type="CAUSAL_LM"),
    "head": LoraConfig(r=4, target_modules=[*Q, "lm_head"], task_type="CAUSAL_LM"),
    "tokens": LoraConfig(r=4, target_modules=Q, trainable_token_indices=[72, 101], task_type="CAUSAL_LM"),
}


def saved(model: Path, folder: Path, config: Any) -> str:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (model / name).is_file():
            (folder / name).write_bytes((model / name).read_bytes())
    return str(folder)


def answered(prediction: Any, *settings: str) -> list[dict[str, Any]]:
    run = prediction("predict.score=true", "data.max_samples=3", *settings)
    predict(run)
    return [json.loads(text) for text in (Path(run.output_dir) / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_engine_answers_with_the_adapter_alone_as_engine_hf_does(model, prediction, tmp_path, kind):
    folder = saved(model, tmp_path / "adapter", KINDS[kind])
    mine, plain = f"predict.adapters={{mine: {folder}}}", answered(prediction, f"output_dir={tmp_path / 'base'}")
    ours = answered(prediction, mine, f"output_dir={tmp_path / 'native'}")
    theirs = answered(prediction, mine, "engine=hf", f"output_dir={tmp_path / 'hf'}")
    for own, other, base in zip(ours, theirs, plain, strict=True):
        assert (own["model"], own["predict"]) == ("mine", other["predict"])
        assert own["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
        assert abs(own["logprob"] - base["logprob"]) > 1e-2


@pytest.mark.skipif(OneDNN.lacks(torch.device("cpu"), torch.bfloat16) is not None, reason="no bf16 products")
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_in_bf16_whose_layers_are_packed(model, prediction, tmp_path, kind):
    folder = saved(model, tmp_path / "adapter", KINDS[kind])
    (exact, *_), (near, *_) = (
        answered(
            prediction,
            f"predict.adapters={{mine: {folder}}}",
            f"predict.precision={precision}",
            f"output_dir={tmp_path / precision}",
        )
        for precision in ("fp32", "bf16")
    )
    assert near["logprob"] == pytest.approx(exact["logprob"], rel=0.1)


def test_beside_others_or_the_base_the_setting_and_the_fix_are_named(model, adapters, prediction, tmp_path):
    folder = saved(model, tmp_path / "adapter", KINDS["dora"])
    with pytest.raises(ConfigError, match=r"predict\.adapters must be mine alone, .* with DoRA.* Set engine=hf"):
        predict(prediction(f"predict.adapters={{mine: {folder}, one: {adapters['one']}}}"))
    with pytest.raises(ConfigError, match=r"predict\.base must be false beside mine, .* Set engine=hf"):
        predict(prediction(f"predict.adapters={{mine: {folder}}}", "predict.base=true"))
    both = f"predict.adapters={{mine: {folder}, one: {adapters['one']}}}"
    found = answered(prediction, both, "predict.base=true", "engine=hf")
    assert len({one["logprob"] for one in found[:3]}) == 3


def test_an_adapter_of_another_base_is_refused_by_the_setting_that_named_it(model, adapters, prediction, tmp_path):
    folder = tmp_path / "adapter"
    saved(model, folder, LoraConfig(r=4, target_modules=Q, task_type="CAUSAL_LM"))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"mine.* must hold weights that can be read"):
        predict(prediction(f"predict.adapters={{mine: {folder}}}"))
    saved(model, folder, LoraConfig(r=64, target_modules=Q, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"predict\.adapters\.mine must be an adapter of this model: .*rank 64"):
        predict(prediction(f"predict.adapters={{mine: {folder}}}", "predict.max_rank=8"))

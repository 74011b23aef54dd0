"""`export.format=adapter`: what PEFT itself computes of the written folder, and what the card says of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.engines.vllm_host import RANKS
from raytune_llm.errors import ConfigError
from tests.models import saved_llama

TARGETS = ["q_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("models") / "base")


def adapter_of(base: Path, folder: Path, config: Any, auto: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    torch.manual_seed(1)
    get_peft_model(auto.from_pretrained(base, **settings), config).save_pretrained(str(folder))
    return folder


def exported(base: Path, place: Path, adapters: dict[str, Path], *settings: str):
    named = ", ".join(f"{name}: '{folder}'" for name, folder in adapters.items())
    words = [f"model.path={base}", f"export.adapters={{{named}}}", "export.format=adapter", "export.check_rows=2"]
    return api.export(load_config("export", [*words, f"export.output_dir={place}", *settings]))


CARDS = {
    "lora": (LoraConfig(**LORA), ["vLLM: with LoRA", "SGLang: with LoRA"]),
    "rslora": (LoraConfig(**LORA, use_rslora=True), ["vLLM: with LoRA", "SGLang: refused; it does not support `use_rslora`"]),
    "dora": (LoraConfig(**LORA, use_dora=True), ["vLLM: refused; it does not support `use_dora`", "SGLang: refused"]),
    "whole": (LoraConfig(**LORA, modules_to_save=["lm_head"]), ["vLLM: refused; it does not support `modules_to_save`"]),
    "large": (
        LoraConfig(**{**LORA, "r": RANKS[-1] + 1, "lora_alpha": RANKS[-1]}),
        ["vLLM: refused; ranks are at most 512", "SGLang: with LoRA"],
    ),
    "oft": (
        OFTConfig(oft_block_size=8, target_modules=TARGETS, init_weights=False, task_type="CAUSAL_LM"),
        ["vLLM: refused; it does not support `peft_type`", "SGLang: refused; it does not support `peft_type`"],
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_peft_computes_the_written_adapter_and_the_card_says_what_others_refuse(base, tmp_path, name):
    config, said = CARDS[name]
    folder = adapter_of(base, tmp_path / "a", config)
    done = exported(base, tmp_path / "out", {"a": folder})
    assert done.difference is not None and done.difference.max_abs < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(line in card for line in said) and "library_name: peft" in card
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")).eval()
    with torch.no_grad():
        adapted = loaded(IDS).logits
        with loaded.disable_adapter():
            assert (adapted - loaded(IDS).logits).abs().max() > 1e-3
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base) and written["inference_mode"]
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and not (tmp_path / "out" / "config.json").exists()


def test_an_adapter_of_a_reward_model_gives_its_scores(base, tmp_path):
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["score"], init_lora_weights=False, task_type="SEQ_CLS")
    folder = adapter_of(base, tmp_path / "a", config, AutoModelForSequenceClassification, num_labels=1)
    done = exported(base, tmp_path / "out", {"a": folder})
    assert done.difference is not None and done.difference.max_abs < 1e-4


def test_an_adapter_may_be_written_in_another_dtype(base, tmp_path):
    folder = adapter_of(base, tmp_path / "a", LoraConfig(**LORA))
    exported(base, tmp_path / "out", {"a": folder}, "export.dtype=bf16")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name].bfloat16()) for name in before)


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_run_with_new_tokens_and_one_that_begins_with_its_base_changed_are_pefts_own(base, tmp_path, chat_rows, cache, method):
    tokens = ["model.new_tokens=['<a>']"] if method == "lora" else []
    words = [f"data.path={chat_rows}", f"data.cache={cache}", "data.max_length=128", f"output_dir={tmp_path / 'run'}"]
    words += ["model=hub", f"model.path={base}", f"adapter={method}", "train.max_steps=2", "train.global_batch_size=8", *tokens]
    ours = ["resources=inline", "tracking=none", "train.precision=fp32", "data.eval_fraction=0.1"]
    api.train(load_config("train", [*words, *ours]))
    words = [f"export.run={tmp_path / 'run'}", "export.format=adapter", f"export.output_dir={tmp_path / 'out'}"]
    done = api.export(load_config("export", words))
    assert done.difference is not None and done.difference.max_abs < 1e-4
    assert ("resize_token_embeddings" in (tmp_path / "out" / "README.md").read_text()) == bool(tokens)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        ("", [], "export.adapters must be one adapter .* there are 0"),
        ("ab", [], "export.adapters must be one adapter .* there are 2"),
        ("a", ["export.weights={a: 0.5}"], "export.weights must be 1"),
        ("a", ["export.dtype=q8_0"], "export.dtype must be auto or one of"),
    ],
)
def test_what_is_no_single_adapter_is_refused_before_anything_is_written(base, tmp_path, names, settings, said):
    folder = adapter_of(base, tmp_path / "a", LoraConfig(**LORA))
    with pytest.raises(ConfigError, match=said):
        exported(base, tmp_path / "out", dict.fromkeys(names, folder), *settings)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]

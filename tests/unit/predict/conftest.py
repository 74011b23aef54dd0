from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.config.load import load_config
from raytune_llm.config.run import PredictRun
from raytune_llm.data.tokens.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama of random weights and a byte tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer: Any = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(model: Path) -> dict[str, str]:
    """Two adapters of it."""
    folders = {}
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        targets = ["q_proj", "v_proj"]
        config = LoraConfig(r=4 * (number + 1), target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        folder = model.parent / name
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(str(folder))
        folders[name] = str(folder)
    return folders


@pytest.fixture
def prediction(model: Path, chat_rows: str, tmp_path: Path) -> Callable[..., PredictRun]:
    """A run of `predict` with these settings beside."""

    def of(*settings: str) -> PredictRun:
        ours = [f"model.path={model}", f"data.path={chat_rows}", f"output_dir={tmp_path / 'out'}", "predict.max_new_tokens=8"]
        return load_config("predict", [*ours, "predict.precision=fp32", "data.max_samples=12", *settings])

    return of

"""A small Llama, the sizes of a large one, and batches of rows for tests of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.config.adapter import LoRA
from raytune_llm.config.load import load_config
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.batches import collate
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.models import attention
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.records import Batch

VOCABULARY = 97
LLAMA3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
"""Its sizes; nobody makes its weights here."""


def model_section(**changed: Any) -> ModelConfig:
    """model=hub, with other values for some of its settings."""
    return replace(load_config("train", ["data.path=x", "model=hub", "model.path=x"]).model, **changed)


def lora_section(**changed: Any) -> LoRA:
    """adapter=lora, with rank 4 and alpha 8 unless they are changed."""
    of_all = {"targets": "all-linear", "last_layers": None, "layers": None, "modules_to_save": [], "path": None}
    own = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}, "experts": False}
    own |= {"rslora": False, "dora": False, "lr_ratio": 1.0, "embedding_lr_ratio": 1.0}
    return LoRA(name="lora", **{**of_all, **own, **changed})


def tiny_llama(backend: str = "varlen", dtype: torch.dtype = torch.float32, seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    attention.attach(model, backend)
    return CausalLM(model)


def saved_llama(folder: Path, **sizes: Any) -> Path:
    """A folder with a small random model, whose tokens are bytes."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **(shape | sizes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def some_rows(lengths: Sequence[int], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random ids; the second half of each row is trained."""
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, VOCABULARY, n).astype(np.int32), np.array([n // 2, n], np.int32)) for n in lengths]


def packed(rows: list[tuple[np.ndarray, np.ndarray]], length: int | None = None) -> Batch:
    """All rows in one pack."""
    return collate([rows], length=length or sum(len(ids) for ids, _ in rows), pad_id=0)


def logits(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """A token function that shows the logits themselves."""
    return logits_NV

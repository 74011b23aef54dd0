"""Reads and writes the files of a reward model that differ from those of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from raytune_llm.errors import ConfigError, DataError
from raytune_llm.models.adapters.saved import CONFIG, WEIGHTS
from raytune_llm.models.config_file import MODEL_CONFIG, change_config

SEPARATE = "value_head.safetensors"
"""LLaMA-Factory's file for the linear layer v_head.summary over the last hidden state, with a bias."""


def has_separate_head(folder: str | Path) -> bool:
    """Whether the folder holds a reward model as a language model, or an adapter of one, with its score head in a separate
    file."""
    return (Path(folder) / SEPARATE).is_file()


def refuse_separate_head(folder: str | Path, setting: str) -> None:
    """Raises ConfigError that names the setting if the folder holds a reward model where an adapter that generates text is
    needed."""
    if has_separate_head(folder):
        fix = "Serve it from the start and alone, in serve.adapters: it gives scores."
        raise ConfigError(setting, f"must be no reward model's, as its {SEPARATE} says it is", got=str(folder), fix=fix)


def read_separate_head(folder: str | Path) -> tuple[Tensor, Tensor]:
    """The weight [1, D] and bias [1] of the score head, float32. Raises DataError if the file has something else."""
    file = Path(folder) / SEPARATE
    try:
        head = load_file(file)
        weight_1D, bias_1 = (head[f"v_head.summary.{name}"].float() for name in ("weight", "bias"))
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(str(file), f"is no head of a reward model ({error})") from error
    return weight_1D, bias_1


def choose_padding(tokenizer: Any, stop_ids: Sequence[int]) -> int | None:
    """The id of a padding token, for a model whose config has none, or None. It must not end answers, since transformers scores a
    text at its last token that is not padding."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    fitting = [id for id in candidates if id is not None and id not in stop_ids]
    return fitting[0] if fitting else None


def name_padding(folder: Path, id: int) -> None:
    """Set pad_token_id in the folder's config.json, if it has one."""
    change_config(folder / MODEL_CONFIG, lambda config: {**config, "pad_token_id": id})


def separate_head_of_adapter(folder: Path) -> None:
    """Convert a saved adapter of a reward model to one of a language model, with its score head in a separate file."""
    weights = load_file(folder / WEIGHTS[0])
    head = {name: weights.pop(name) for name in list(weights) if name.endswith("score.weight")}
    save_file(weights, folder / WEIGHTS[0], metadata={"format": "pt"})
    change_config(folder / CONFIG, lambda config: {**config, "task_type": "CAUSAL_LM", "modules_to_save": None})
    _save_head(folder, *head.values())


def save_with_separate_head(folder: Path, language_model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Save a language model with these weights, and the score head in a separate file."""
    weights = dict(weights)
    head = weights.pop("score.weight")
    language_model.load_state_dict(weights, strict=False)
    language_model.save_pretrained(folder)
    _save_head(folder, head)


def _save_head(folder: Path, weight_1D: Tensor) -> None:
    head = {"v_head.summary.weight": weight_1D.float().contiguous(), "v_head.summary.bias": torch.zeros(1)}
    save_file(head, folder / SEPARATE, metadata={"format": "pt"})

"""Multimodal models in text training: which part is the language model, and which parts are left out.

Towers and projectors for other media are left out in text training: text does not pass through them, strategies would wait for
their gradients, and they would take memory. Full fine-tuning saves them unchanged (Policy.save).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file

from raytune_llm import packaged

TRAINED_ON_TEXT = (
    "aya_vision", "cohere2_vision", "gemma3", "gemma4", "glm4v", "glm4v_moe", "idefics3", "internvl", "lfm2_vl", "llama4",
    "llava", "llava_next", "llava_onevision", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl",
    "qwen3_vl_moe", "smolvlm",
)  # fmt: skip
"""Families, by model_type, in which the whole model computes text exactly as its language model does."""


TOWERS = {"vision_config", "audio_config"}
"""Entries of a config for media other than text."""


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a model has parts for other media, beside its language model or inside it (Phi-4-multimodal)."""
    kind: Any = type(config)
    try:
        return config.get_text_config() is not config or not TOWERS.isdisjoint(kind.sub_configs)
    except ValueError:  # it has several text configs (MusicGen)
        return True


def text_model(model: PreTrainedModel) -> nn.Module:
    """The module that computes last hidden states from embedded tokens."""
    found: Any = model.get_decoder() if is_multimodal(model.config) else model.base_model
    return found.model if hasattr(found, "lm_head") else found  # what Llama 4 calls so has a head


def leave_other_media_out(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the parts that text does not pass through. Names stay the same."""
    if is_multimodal(model.config):
        parts = (text_model(model), model.get_output_embeddings())
        for name, child in list(model.base_model.named_children()):
            if not any(module in parts for module in child.modules()):
                setattr(model.base_model, name, None)
    return model


def processor_files(path: str | None, revision: str | None) -> list[Path]:
    """The files of a model's processor for images, videos and sounds."""
    if path is None:
        return []
    missing_is_none = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    names = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
    found = (cached_file(packaged.resolve(path), name, revision=revision, **missing_is_none) for name in names)
    return [Path(file) for file in found if file is not None]

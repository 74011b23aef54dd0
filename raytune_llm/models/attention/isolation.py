"""Which models keep the documents of a pack apart.

Attention's back ends do (attention.py), for layers that call them. Whatever else takes something from token to token, be it a
recurrent or convolutional state or attention of the model's own, knows no boundaries, and documents would learn from each other.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from raytune_llm.errors import ConfigError

ATTENDS = {"full_attention", "sliding_attention"}
"""Kinds of layers, by transformers' names, that mix tokens only in causal attention, full or in a sliding window."""


def check_isolation(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Raises ConfigError for a model whose documents would see each other in a pack."""
    mixes = _mixes(config, model_class)
    if mixes is not None:
        raise ConfigError(
            "model.path",
            f"must be a model that keeps the rows of a pack separate, which {config.model_type} does not: {mixes}",
            got=config.name_or_path or config.model_type,
            fix="Choose one of another family: llama, mistral, qwen3, gemma3_text, phi3, granite, olmo2 are some that do.",
        )


def _mixes(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> str | None:
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or (["state"] if model_class._is_stateful else []))
    if unknown := sorted(kinds - ATTENDS):
        return f"it has layers of the kind {', '.join(unknown)}, which no back end here masks by rows"
    if not (model_class._supports_attention_backend and model_class._can_set_attn_implementation()):
        return "its layers compute attention in a way of their own"
    return None

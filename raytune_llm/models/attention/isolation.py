"""Which models keep the documents of a pack apart, and which need a line of a batch for each row.

Attention's back ends do (attention.py), for layers that call them. Whatever else takes something from token to token, be it a
recurrent or convolutional state or attention of the model's own, knows no boundaries, and documents would learn from each other.
In a line of its own, padded at its end, a row is computed as by itself by any causal model: transformers' own layers then do it.
A model that comes with its own code and computes attention in it is taken for one.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from raytune_llm.errors import ConfigError
from raytune_llm.models.own_code import has_own_code, own_class

CHUNKED = "chunked_attention"
"""A kind of layers, by transformers' name: causal attention within chunks, counted from a row's first token (Llama 4)."""
ATTENDS = {"full_attention", "sliding_attention", CHUNKED}
"""Kinds of layers, by transformers' names, that mix tokens only in causal attention: full, in a sliding window, or in chunks of
which a row is not longer than one (first_chunk)."""
OWN_WAY = {
    "doge": "its layers make an attention mask of their own",
    "nemotron": "its layers do not pass boundaries on to attention",
}
"""Architectures that call attention as others do, but not with what they are given."""
ONE_ROW_A_LINE = (
    "bamba", "bloom", "codegen", "falcon", "falcon_h1", "falcon_mamba", "gpt_neo", "gptj", "granitemoehybrid", "jamba", "lfm2",
    "lfm2_moe", "mamba", "mamba2", "minimax", "mpt", "nemotron", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next", "recurrent_gemma", "rwkv", "stablelm", "xglm",
)  # fmt: skip
"""Architectures, by model_type, in which padding after a row does not change the row, so that they can train unpacked."""


def check_isolation(config: PretrainedConfig, model_class: type[PreTrainedModel], *, packing: bool = False) -> None:
    """Raises ConfigError for a model whose documents would see each other: in a pack, or whatever is done.

    packing: rows are to share a line of the batch."""
    mixes = _mixes(config, model_class)
    if mixes is None:
        return
    if not _takes_lines(config, model_class):
        raise ConfigError(
            "model.path",
            f"must be a model that keeps the rows of a pack separate, which {config.model_type} does not: {mixes}",
            got=config.name_or_path or config.model_type,
            fix="Choose one of another family: llama, mistral, qwen3, gemma3_text, phi3, granite, olmo2 are some that do.",
        )
    if packing:
        raise ConfigError(
            "data.packing",
            f"must be false for {config.model_type}, which does not keep the rows of a pack separate: {mixes}",
            got=True,
            fix="Set data.packing=false: a row then has a line of the batch for itself, and train.micro_batch_size is a number "
            "of rows.",
        )


def first_chunk(config: PretrainedConfig) -> int | None:
    """Tokens up to which layers that attend in chunks attend to all. In Llama 4 others make long rows' attention sharper, by a
    token's place in its pack, from the place on that is one below floor_scale."""
    text: Any = config.get_text_config()
    if CHUNKED not in (getattr(text, "layer_types", None) or ()):
        return None
    sharper = text.floor_scale - 1 if getattr(text, "attn_temperature_tuning", False) else text.attention_chunk_size
    return min(text.attention_chunk_size, sharper)


def needs_lines(config: PretrainedConfig, model_class: type[PreTrainedModel] | None) -> bool:
    """Whether each row needs a line for itself, which the model's own layers compute."""
    if model_class is None or not _takes_lines(config, model_class):
        return False
    return _mixes(config, model_class) is not None


def computes_by_itself(config: PretrainedConfig) -> bool:
    """Whether the config is of a model whose own code computes attention."""
    own = own_class(config)
    return own is not None and _mixes(config, own) is not None


def _takes_lines(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> bool:
    return has_own_code(model_class) or config.get_text_config().model_type in ONE_ROW_A_LINE


def _mixes(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> str | None:
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or (["state"] if model_class._is_stateful else []))
    if unknown := sorted(kinds - ATTENDS):
        return f"it has layers of the kind {', '.join(unknown)}, which no back end here masks by rows"
    if text.model_type in OWN_WAY:
        return OWN_WAY[text.model_type]
    if not (model_class._supports_attention_backend and model_class._can_set_attn_implementation()):
        return "its layers compute attention in a way of their own"
    return None

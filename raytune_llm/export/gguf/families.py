"""Families of models that llama.cpp computes as transformers does: their metadata, and how their tensors differ.

Names of keys and tensors are the gguf package's. A config with something that llama.cpp would leave out is refused: the
file would answer otherwise than the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from raytune_llm.errors import ConfigError

Change = Callable[[str, Tensor, Any], Tensor]
"""(tensor's name in transformers, tensor, the model's config) -> the tensor as llama.cpp needs it."""


@dataclass(frozen=True)
class Family:
    architecture: MODEL_ARCH
    describe: Callable[[GGUFWriter, Any], None]
    """Adds the family's metadata to that of all families."""
    change: Change
    refuse: Callable[[Any], str | None]
    """(config) -> why llama.cpp can't compute it; None if it can."""

    read_as: Callable[[Any], PretrainedConfig] = copy.deepcopy
    """The config class that transformers' GGUF reader uses for it."""

    @property
    def architecture_name(self) -> str:
        return MODEL_ARCH_NAMES[self.architecture]


def _same(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor


def _interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Interleave the rotary pairs of each head's queries and keys, since llama.cpp rotates adjacent elements in this family."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    number = next((heads[part] for part in heads if f".{part}." in name), None)
    if number is None:
        return tensor
    halves = tensor.reshape(number, 2, tensor.shape[0] // number // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _norms_plus_one(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Add 1 to norms: Gemma multiplies by 1 + weight, llama.cpp by the weight in the file."""
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _nothing(writer: GGUFWriter, config: Any) -> None:
    return None


def _window(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    _window(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma3_refuses(config: Any) -> str | None:
    """The config's properties that llama.cpp does not read from the file."""
    expected = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    if config.query_pre_attn_scalar != expected:
        return f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, where llama.cpp takes {expected}"
    if config.attn_logit_softcapping is not None or config.final_logit_softcapping is not None:
        return "it has softcaps"
    if config.rope_parameters["sliding_attention"] != {"rope_type": "default", "rope_theta": 10000.0}:
        return "its layers with a window have other rotary positions than the usual 10,000"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    is_full = [kind == "full_attention" for kind in config.layer_types]
    return None if is_full == [n % 6 == 5 for n in range(len(is_full))] else "not every sixth layer is one without a window"


def _phi3_refuses(config: Any) -> str | None:
    if rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates only a part of each head (partial_rotary_factor)"
    return _slides(config)


def _slides(config: Any) -> str | None:
    """llama.cpp has no sliding windows in this family."""
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings or (kinds and "sliding_attention" not in kinds):
        return None
    if not kinds and getattr(config, "use_sliding_window", True) is False:
        return None
    return f"its layers have a sliding window of {window} tokens, which llama.cpp does not support in this family"


def _llama_refuses(config: Any) -> str | None:
    if getattr(config, "mlp_bias", False):
        return "its feed-forward layers have biases (mlp_bias)"
    return _slides(config)


def _qwen3_refuses(config: Any) -> str | None:
    return "its attention has biases (attention_bias)" if config.attention_bias else _slides(config)


def _gemma2_refuses(config: Any) -> str | None:
    expected = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 46 else config.head_dim
    if config.query_pre_attn_scalar != expected:
        return f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, where llama.cpp takes {expected}"
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        return "it has no softcaps"
    alternates = [kind == "sliding_attention" for kind in config.layer_types]
    return None if alternates == [n % 2 == 0 for n in range(len(alternates))] else "its layers don't alternate between windows"


def _as_llama(config: Any) -> PretrainedConfig:
    """Without a sliding window, Mistral is computed like Llama."""
    return LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama"})


FAMILIES: Mapping[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, _nothing, _interleaved, _llama_refuses),
    "mistral": Family(MODEL_ARCH.LLAMA, _nothing, _interleaved, _llama_refuses, _as_llama),
    "qwen2": Family(MODEL_ARCH.QWEN2, _nothing, _same, _slides),
    "qwen3": Family(MODEL_ARCH.QWEN3, _nothing, _same, _qwen3_refuses),
    "gemma2": Family(MODEL_ARCH.GEMMA2, _gemma2, _norms_plus_one, _gemma2_refuses),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, _window, _norms_plus_one, _gemma3_refuses),
    "phi3": Family(MODEL_ARCH.PHI3, _nothing, _same, _phi3_refuses),
}
"""By model_type."""


def family_of(config: Any, got: str) -> Family:
    """The family of the model. Raises ConfigError if llama.cpp computes the model differently from transformers."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise _impossible(f"{config.model_type} is not one of {', '.join(FAMILIES)}", got)
    if (why := family.refuse(config)) is not None:
        raise _impossible(why, got)
    if (kind := rope(config).get("rope_type", "default")) not in ROPES:
        raise _impossible(f"its rotary positions are scaled by {kind}, which is not one of {', '.join(ROPES)}", got)
    return family


def describe(writer: GGUFWriter, family: Family, config: Any) -> None:
    """Write the metadata of the model's shape."""
    head = head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parameters = rope(config)
    writer.add_rope_freq_base(parameters["rope_theta"])
    ROPES[parameters.get("rope_type", "default")](writer, parameters, config)
    family.describe(writer, config)


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope(config: Any) -> Mapping[str, Any]:
    """The config's rotary parameters. If layers with a sliding window have others, these are those of the full layers."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _plain(writer: GGUFWriter, parameters: Mapping[str, Any], config: Any) -> None:
    return None


def _linear(writer: GGUFWriter, parameters: Mapping[str, Any], config: Any) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(parameters["factor"])


ROPES: Mapping[str, Callable[[GGUFWriter, Mapping[str, Any], Any], None]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _plain,
}
"""Type of RoPE scaling -> writes its metadata. llama3 needs a tensor instead, `rope_factors`."""


def rope_factors(config: Any) -> Tensor | None:
    """The divisor of each rotary frequency in Llama 3.1, float32 [head_dim / 2] (transformers' _compute_llama3_parameters)."""
    parameters = rope(config)
    if parameters.get("rope_type") != "llama3":
        return None
    base, old = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    head = head_dim(config)
    factors = []
    for n in range(0, head, 2):
        wavelength = 2 * math.pi * base ** (n / head)
        smooth = min(1.0, max(0.0, (old / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _impossible(why: str, got: str) -> ConfigError:
    return ConfigError("export.format", f"can't write a GGUF file of this model: {why}", got=got, fix="Export it as hf.")

"""Finds the layers (repeated blocks) of a transformers model: the units of sharding, recomputation and compilation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers with their names, in order. A model with its own code may name the layers' class (_no_split_modules)."""
    found = False
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            found = True
            yield name, module
    if not found:
        whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        kinds = getattr(whole, "_no_split_modules", None) or ()
        yield from ((name, module) for name, module in model.named_modules() if type(module).__name__ in kinds)


ROUTERS = ("Router", "MoEV1Gate", "TopKGating")
"""The ends of the names of classes that choose a token's experts."""


def is_passed_over(parent: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether this linear layer can't be replaced by an adapter or a quantized layer, because its model does more than call it.

    The kernels of a state-space mixer (Mamba and similar) read the weights of all its layers except in_proj. A router of experts
    may return more than a product (Phi-3.5-MoE, Llama 4), or read a layer's weights (LongCat, Hunyuan). Gemma 3n clips the few
    weights that mix its streams.
    """
    of_mixer = hasattr(parent, "A_log") and hasattr(parent, "D")
    of_router = any(type(module).__name__.endswith(ROUTERS) for module in (parent, child))
    of_streams = type(parent).__name__.endswith("AltUp")
    return (of_mixer and name != "in_proj") or of_router or of_streams


def largest(config: PretrainedConfig, name: str) -> Any:
    """The entry of a text config; its largest value if it differs by layer (Gemma 3n and 4); None if there is none."""
    each = config.per_layer_config if config.is_heterogeneous else [config]
    values = (getattr(layer, name, None) for layer in each)
    return max((max(value) if isinstance(value, list) else value for value in values if value), default=None)


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in named_layers(model)]


def frozen_first(base: PreTrainedModel) -> list[nn.Module]:
    """The layers before the first that is trained, with adapters in them and requires_grad as it is trained: a backward pass does
    not come to them. None where the embedding is trained."""
    frozen = _is_frozen(base.get_input_embeddings())
    return list(takewhile(_is_frozen, layers(base))) if frozen else []


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def heads_of(config: PretrainedConfig) -> tuple[int, int]:
    """The number of query heads of a layer, and the width of one."""
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0  # Mamba has none
    return heads, largest(text, "head_dim") or text.hidden_size // max(heads, 1)

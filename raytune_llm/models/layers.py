"""The repeated blocks of a transformers model: the units of sharding, recomputation and compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """In their order. A model with its own code may have them as ordinary modules, and name their class."""
    found = False
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            found = True
            yield name, module
    if not found:
        whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        kinds = getattr(whole, "_no_split_modules", None) or ()
        yield from ((name, module) for name, module in model.named_modules() if type(module).__name__ in kinds)


def is_passed_over(parent: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether what stands in this linear layer's place, an adapter or a quantized layer, would have no effect or break what calls
    it. The kernels of a state-space mixer (Mamba and its kin) read the weights of all its layers but in_proj; a router of experts
    may be a linear layer that gives more than a product (Phi-3.5-MoE, Llama 4), or hold one whose weights it reads (LongCat);
    Gemma 3n clips the weights that mix its streams, which are a few numbers."""
    of_mixer = hasattr(parent, "A_log") and hasattr(parent, "D")
    of_router = any(type(module).__name__.endswith("Router") for module in (parent, child))
    of_streams = type(parent).__name__.endswith("AltUp")
    return (of_mixer and name != "in_proj") or of_router or of_streams


def largest(config: PretrainedConfig, name: str) -> Any:
    """The largest value of a text config's entry in any layer, if it has it: in some families layers differ (Gemma 3n and 4)."""
    each = config.per_layer_config if config.is_heterogeneous else [config]
    values = (getattr(layer, name, None) for layer in each)
    return max((max(value) if isinstance(value, list) else value for value in values if value), default=None)


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in named_layers(model)]

"""The repeated blocks of a transformers model: the units of sharding, recomputation and compilation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer))


def is_passed_over(parent: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether what stands in this linear layer's place, an adapter or a quantized layer, would have no effect or break what calls
    it. The kernels of a state-space mixer (Mamba and its kin) read the weights of all its layers but in_proj; a router of experts
    may be a linear layer that gives more than a product (Phi-3.5-MoE, Llama 4)."""
    of_mixer = hasattr(parent, "A_log") and hasattr(parent, "D")
    return (of_mixer and name != "in_proj") or type(child).__name__.endswith("Router")


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in named_layers(model)]

"""The repeated blocks of a transformers model: the units of sharding, recomputation and compilation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer))


def reads_weights(module: nn.Module) -> bool:
    """Whether it is a state-space mixer (Mamba and its kin). Its kernels read the weights of all its linear layers but in_proj,
    so that what stands in a layer's place, an adapter or a quantized layer, would be passed over."""
    return hasattr(module, "A_log") and hasattr(module, "D")


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in named_layers(model)]

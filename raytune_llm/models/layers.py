"""The repeated blocks of a transformers model: the units of sharding, recomputation and compilation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer))


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in named_layers(model)]

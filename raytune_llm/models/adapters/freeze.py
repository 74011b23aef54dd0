"""Freeze tuning: some layers of the model, and modules outside of the layers, are trained directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import layer_numbers
from raytune_llm.models.layers import named_layers


def freeze(
    model: PreTrainedModel,
    *,
    first_layers: int | None,
    last_layers: int | None,
    layers: Sequence[int] | None,
    modules: str | Sequence[str],
    extra_modules: Sequence[str],
) -> None:
    """Set requires_grad. Raises ConfigError for layers and modules that the model does not have."""
    named = list(named_layers(model))
    size, count = len(named), first_layers or last_layers
    if count is not None and count > size:
        setting = f"adapter.{'first' if first_layers else 'last'}_layers"
        raise ConfigError(setting, f"must be at most the model's {size} layers", got=count, fix="Or train all: adapter=none.")
    numbers = range(count or 0) if first_layers else range(size - (count or 0), size) if last_layers else layers
    model.requires_grad_(False)
    for number in layer_numbers(numbers or (), size):
        _train_in(named[number][1], modules)
    in_layers = tuple(f"{name}." for name, _ in named)
    outside = [(name, module) for name, module in model.named_modules() if name and not f"{name}.".startswith(in_layers)]
    # Modules that contain the layers are left out, since naming one would train all layers.
    outside = [(name, module) for name, module in outside if not any(layer.startswith(f"{name}.") for layer in in_layers)]
    outside = [(name, module) for name, module in outside if _has_weights(module)]
    _train(outside, extra_modules, "adapter.extra_modules", "modules outside of the model's layers")


def _train_in(layer: nn.Module, modules: str | Sequence[str]) -> None:
    if modules == "all":
        layer.requires_grad_(True)
        return
    inside = [(name, module) for name, module in layer.named_modules() if name and _has_weights(module)]
    _train(inside, modules, "adapter.modules", "modules of the model's layers")


def _train(named: Sequence[tuple[str, nn.Module]], wanted: Sequence[str], setting: str, what: str) -> None:
    found: dict[str, list[Any]] = {}
    for name, module in named:
        found.setdefault(name.rpartition(".")[2], []).append(module)
    if unknown := [name for name in wanted if name not in found]:
        raise ConfigError(setting, f"must name {what}", got=unknown, fix=f"It has {', '.join(sorted(found))}.")
    for name in wanted:
        for module in found[name]:
            module.requires_grad_(True)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())

"""Which linear layers of a model are quantized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from raytune_llm.errors import ConfigError
from raytune_llm.models.layers import is_passed_over
from raytune_llm.models.quantization.base import SkipModules

QUERIES_KEYS_VALUES = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv"}
"""The q, k and v projections in transformers' models, where FP8 costs most loss for its speed-up."""
Found = tuple[nn.Module, str, nn.Linear]
"""A layer with its parent and its name there."""


def linears_but(layers: Iterable[nn.Module], skip_modules: SkipModules) -> list[Found]:
    """Each linear layer of the model, but those named by `skip_modules`. An adapter calls the layer inside it
    base_layer, and keeps its own in dictionaries."""
    found = _linears(layers)
    names = {name for *_, name in found}
    if skip_modules == "auto":
        skip_modules = sorted(names & QUERIES_KEYS_VALUES)
    if unknown := sorted(set(skip_modules) - names):
        fix = f"The model has {', '.join(sorted(names))}."
        raise ConfigError("quantization.skip_modules", "must name linear layers of the model", got=unknown, fix=fix)
    return [(parent, child_name, child) for parent, child_name, child, name in found if name not in skip_modules]


def linears_of(layers: Iterable[nn.Module], kinds: Sequence[type[nn.Module]]) -> list[tuple[nn.Module, str, Any]]:
    """Each layer of these kinds, with its parent and its name there."""
    return [(parent, child_name, child) for parent, child_name, child, _ in _linears(layers, kinds)]


def names_of_linears(layers: Iterable[nn.Module]) -> list[str]:
    return sorted({name for *_, name in _linears(layers)})


def frozen_experts(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """The frozen weights of mixtures that have their experts in one tensor [E, N, K]: modules, and names there. A convolution's
    weight, which has three dimensions too, is none."""
    return [
        (module, name)
        for layer in layers
        for module in layer.modules()
        if not isinstance(module, nn.Conv1d)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and not parameter.requires_grad
    ]


def _linears(
    layers: Iterable[nn.Module], kinds: Sequence[type[nn.Module]] = (nn.Linear,)
) -> list[tuple[nn.Module, str, Any, str]]:
    """Each with its name in the model."""
    return [
        (parent, child_name, child, f"{parent_name}.{child_name}".removesuffix(".base_layer").rpartition(".")[2])
        for layer in layers
        for parent_name, parent in layer.named_modules()
        for child_name, child in parent.named_children()
        if type(child) in kinds and not isinstance(parent, nn.ModuleDict) and not is_passed_over(parent, child_name, child)
    ]

"""Which linear layers of a model are quantized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from raytune_llm.errors import ConfigError
from raytune_llm.models.layers import is_passed_over
from raytune_llm.models.quantization.base import SkipModules

QUERIES_KEYS_VALUES = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv"}
"""The names of q, k and v projections in transformers' models. There, FP8 raises the loss most for the time that it saves."""
Found = tuple[nn.Module, str, nn.Linear]
"""(parent module, the layer's attribute name, the layer)."""


def linears_but(layers: Iterable[nn.Module], skip_modules: SkipModules) -> list[Found]:
    """Each linear layer in these layers except those that `skip_modules` names. Of an adapted layer, this is its base_layer, not
    its A and B, which are in ModuleDicts. Raises ConfigError for unknown names."""
    found = _linears(layers)
    names = {name for *_, name in found}
    if skip_modules == "auto":
        skip_modules = sorted(names & QUERIES_KEYS_VALUES)
    if unknown := sorted(set(skip_modules) - names):
        fix = f"The model has {', '.join(sorted(names))}."
        raise ConfigError("quantization.skip_modules", "must name linear layers of the model", got=unknown, fix=fix)
    return [(parent, child_name, child) for parent, child_name, child, name in found if name not in skip_modules]


def linears_of(layers: Iterable[nn.Module], kinds: Sequence[type[nn.Module]]) -> list[tuple[nn.Module, str, Any]]:
    """(parent module, attribute name, layer) of each layer of these classes."""
    return [(parent, child_name, child) for parent, child_name, child, _ in _linears(layers, kinds)]


def names_of_linears(layers: Iterable[nn.Module]) -> list[str]:
    return sorted({name for *_, name in _linears(layers)})


def frozen_experts(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """(module, parameter name) of the frozen experts of mixtures, each one tensor [E, N, K]. A convolution's weight, which has
    three dimensions too, is left out."""
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
    """(parent module, attribute name, layer, last part of the layer's name in the unadapted model)."""
    return [
        (parent, child_name, child, f"{parent_name}.{child_name}".removesuffix(".base_layer").rpartition(".")[2])
        for layer in layers
        for parent_name, parent in layer.named_modules()
        for child_name, child in parent.named_children()
        if type(child) in kinds and not isinstance(parent, nn.ModuleDict) and not is_passed_over(parent, child_name, child)
    ]

"""LLaMA Pro: new layers between the model's own; only they are trained (Wu et al. 2024, arXiv 2401.02415).

Each begins as a copy of the layer before it, with zero output projections, so that it is the identity.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_llm.errors import ConfigError
from raytune_llm.models.layers import named_layers
from raytune_llm.models.stored import Stored

LAST = ("self_attn.o_proj", "mlp.down_proj")
"""The output projections, through which a layer adds to the residual stream."""


def llama_pro(model: PreTrainedModel, *, new_layers: int) -> None:
    """Insert the layers at equal distances, and set requires_grad. Raises ConfigError if new_layers does not divide the model's
    layers, or for layers without these output projections."""
    named = list(named_layers(model))
    size = len(named)
    if size % new_layers:
        fitting = [str(number) for number in range(1, size + 1) if size % number == 0]
        rule = f"must divide the model's {size} layers"
        raise ConfigError("adapter.new_layers", rule, got=new_layers, fix=f"Set one of {', '.join(fitting)}.")
    if any(not isinstance(_inside(layer, name), nn.Linear) for _, layer in named for name in LAST):
        rule = f"can be llama_pro only for layers with {' and '.join(LAST)}, which those of {model.config.model_type} don't have"
        raise ConfigError("adapter", rule, got="llama_pro", fix="Set adapter=freeze or adapter=lora.")
    model.requires_grad_(False)
    every, config = size // new_layers, model.config.get_text_config()
    memo = {id(shared): shared for shared in (model.config, config)}
    layers: list[nn.Module] = []
    for number, (_, layer) in enumerate(named, start=1):
        layers.append(layer)
        if number % every == 0:
            layers.append(_passing_on(layer, dict(memo)))
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = number  # type: ignore[assignment]
    parent, _, name = named[0][0].rpartition(".")[0].rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers))
    _lengthen(config, size, every)


def _inside(layer: nn.Module, name: str) -> Any:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


@torch.no_grad()
def _passing_on(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A trained copy of the layer with zero output projections."""
    new = copy.deepcopy(layer, memo)
    for name in LAST:
        last = new.get_submodule(name)
        for own, value in list(last.named_parameters(recurse=False)):
            device = torch.device("cpu") if isinstance(value, Stored) else value.device
            last.register_parameter(own, nn.Parameter(torch.zeros(value.shape, dtype=value.dtype, device=device)))
    return new.requires_grad_(True)


def _lengthen(config: Any, size: int, every: int) -> None:
    """Update the config's number of layers and its lists with one entry per layer."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == size:
            setattr(config, name, [entry for number, one in enumerate(value, 1) for entry in [one] * (1 + (number % every == 0))])
    config.num_hidden_layers = size + size // every

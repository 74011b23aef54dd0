"""An adapter method: PEFT's config for it, and what its settings need of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.banked import BankedLinear
from raytune_llm.models.layers import named_layers
from raytune_llm.models.quantization.base import QuantizedLinear

LINEAR = nn.Linear | Conv1D | QuantizedLinear
Layers = Mapping[str, nn.Module]
"""The layers that get an adapter, by their names in the model."""


@dataclass(frozen=True)
class Kept:
    """Activations that the layers of a method save for the backward pass, if they differ from grouped LoRA's."""

    alone: bool = False
    """Each layer is computed alone, by PEFT, and recomputes nothing."""
    outputs: int = 0
    """Saved values for each value of the output."""
    converts: bool = False
    """Each saves its own converted input."""
    drops_inputs: bool = True
    """adapter.dropout is of the input."""


@dataclass(frozen=True)
class Method:
    """A kind of adapter."""

    config: Callable[..., PeftConfig]
    """Of those settings of its section that are not `targets`, `last_layers` or `path`."""
    describes: Callable[[PeftConfig], bool]
    """Whether the config of a saved adapter is of this kind."""
    check: Callable[..., None]
    """(layers, **settings): raises ConfigError if the settings don't fit one of the layers."""
    begin: Callable[[nn.Module, str], None] = lambda model, key: None
    """For new adapters: called with the model and PEFT's name of the adapter once it is in the layers."""
    kept: Kept = Kept()


def targeted(model: PreTrainedModel, targets: str | list[str], last_layers: int | None) -> Layers:
    """The layers that adapter.targets and adapter.last_layers name. Raises ConfigError for a name that no layer has."""
    linear = {name: module for name, module in _of_base(model) if isinstance(module, LINEAR | nn.Embedding)}
    head, all_linear = model.get_output_embeddings(), targets == "all-linear"
    found: dict[str, nn.Module] = {}
    for name, module in linear.items():
        last = name.rpartition(".")[2]
        wanted = module is not head and not isinstance(module, nn.Embedding) if all_linear else last in targets
        if wanted:
            found[name] = module
    named = {name.rpartition(".")[2] for name in found}
    unknown = [] if all_linear else [target for target in targets if target not in named]
    if unknown or not found:
        names = sorted({name.rpartition(".")[2] for name, module in linear.items() if not isinstance(module, nn.Embedding)})
        raise ConfigError(
            "adapter.targets", "must name linear layers of the model", got=unknown or targets, fix=f"It has {', '.join(names)}."
        )
    before = None if last_layers is None else in_layers_before(model, last_layers)
    return {name: module for name, module in found.items() if before is None or not re.fullmatch(before, name)}


def _of_base(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model by their names there, whatever adapters lie around them."""
    if isinstance(module, BaseTunerLayer | BankedLinear):
        yield name, module.get_submodule("base_layer")
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _of_base(child, f"{name}.{child_name}".removeprefix("."))


def in_layers_before(model: PreTrainedModel, last: int) -> str | None:
    """A pattern of the names of all modules in the layers before the last so many. None where there are no others."""
    names = [name for name, _ in named_layers(model)]
    before = "|".join(map(re.escape, names[:-last]))
    return rf"({before})\..*" if before else None


def sides(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, Conv1D)
    return layer.nx, layer.nf

"""An adapter method: PEFT's config for it, and what its settings need of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from raytune_llm.config.adapter import Layered
from raytune_llm.config.section import settings_of
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.banked import BankedLinear
from raytune_llm.models.adapters.protocol import Observer
from raytune_llm.models.layers import is_passed_over, named_layers
from raytune_llm.models.multimodal import is_multimodal
from raytune_llm.models.quantization.base import Quantization, QuantizedLinear

LINEAR = nn.Linear | Conv1D | QuantizedLinear
Layers = Mapping[str, nn.Module]
"""The layers that get an adapter, by their names in the model."""
Tensors = Mapping[str, Tensor]
"""What an adapter's file holds, by names in the file."""
ALL_LINEAR = "all-linear"
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """Activations that the layers of a method save for the backward pass, if they differ from grouped LoRA's."""

    alone: bool = False
    """Each layer is computed alone, by PEFT, and recomputes nothing."""
    inputs: bool = True
    """Each layer's input is saved."""
    outputs: float = 0
    """Saved values for each value of all linear layers' outputs."""
    converts: bool = False
    """Each saves its own converted input."""
    drops_inputs: bool = True
    """adapter.dropout is of the input."""


@dataclass(frozen=True)
class Method:
    """A kind of adapter."""

    config: Callable[..., PeftConfig]
    """Makes PEFT's config of those settings of its section that are not in Layered."""
    describes: Callable[[PeftConfig], bool]
    """Whether the config of a saved adapter is of this kind."""
    check: Callable[..., None]
    """(layers, **settings): raises ConfigError if the settings don't fit one of the layers."""
    continues: Callable[[PeftConfig, Layered], None] = lambda saved, section: None
    """(config of a saved adapter of this kind, the section): raises ConfigError if the section says otherwise."""
    begin: Callable[[nn.Module, str, Quantization | None], None] = lambda model, key, quantization: None
    """For new adapters: called with the model, PEFT's name of the adapter once it is in the layers, and what will be made of the
    layers' weights."""
    placed: Callable[[nn.Module, str], None] = lambda model, key: None
    """For new and saved adapters: called with the model and PEFT's name of the adapter once PEFT's layers are there, to put
    faster ones in their place."""
    quantized: Callable[..., None] = lambda model, key, *, new: None
    """(model, PEFT's name of the adapter, new=whether it is a new one): called once the layers under it are quantized, if any
    are."""
    observer: Callable[[nn.Module, str], Observer] | None = None
    """For new adapters that begin from the inputs of their layers: (the model, PEFT's name of the adapter) -> what sees them."""
    saved: Callable[[PeftConfig, Tensors, Tensors], tuple[PeftConfig, Tensors]] | None = None
    """(config, tensors, as they began) -> what is saved in their place. None: they are saved as they are."""
    lr_factor: Callable[[str, Layered], float] = lambda name, section: 1.0
    """(a parameter's name, the section) -> its learning rate over that of the schedule."""
    kept: Kept = Kept()


def new_config(model: PreTrainedModel, section: Layered, method: Method) -> tuple[PeftConfig, Layers]:
    """PEFT's config of a new adapter, and the layers that it is for. Raises ConfigError for settings that don't fit the model."""
    of_all = {name: getattr(section, name) for name in PLACEMENT}
    settings = {name: value for name, value in settings_of(section).items() if name not in of_all}
    experts = expert_weights(model, section, settings["rank"]) if settings.pop("experts", False) else []
    config: Any = method.config(**settings)
    layers, targets = targeted(model, section), section.targets
    is_mixture = config.peft_type == PeftType.LORA and bool(_expert_weights(model))
    if is_mixture:
        layers = _without_experts_names(model, layers, section)
    if section.changes_base and (named := sorted(tied_ends(model) & layers.keys())):
        rule = f"can't name {named[0]}, which is the embedding's weight too: this adapter takes a part out of its layers' weights"
        raise ConfigError("adapter.targets", rule, got=section.targets, fix="Leave it out, or set adapter=lora.")
    whole = whole_modules(model, section.modules_to_save)
    method.check(layers, **settings)
    if is_mixture:  # of all-linear and of expressions PEFT makes last parts of names, and puts adapters on experts and routers
        config.target_modules = set(layers)
    elif _takes_as_given(model, section, layers):
        config.target_modules = targets if isinstance(targets, str) else set(targets)
    else:
        config.target_modules = "|".join(map(re.escape, layers))
    config.modules_to_save = whole or None
    if experts:
        config.target_parameters = experts
    config.task_type = "CAUSAL_LM"
    return config, layers


PLACEMENT = ("targets", "last_layers", "layers", "modules_to_save", "path")
"""The settings of every section on layers."""


def targeted(model: PreTrainedModel, section: Layered) -> Layers:
    """The layers that adapter.targets names, of those that adapter.last_layers or adapter.layers do. Raises ConfigError for a
    name that no layer has."""
    targets = section.targets
    passed_over = _passed_over(model)
    linear = {
        name: module
        for name, module in _of_base(model)
        if isinstance(module, LINEAR | nn.Embedding) and (name not in passed_over or targets != ALL_LINEAR)
    }
    head, is_wanted = model.get_output_embeddings(), _pattern(targets)
    found = {
        name: module
        for name, module in linear.items()
        if (module is not head and not isinstance(module, nn.Embedding) if targets == ALL_LINEAR else is_wanted(name))
    }
    named = {name.rpartition(".")[2] for name in found}
    unknown = [] if isinstance(targets, str) else [target for target in targets if target not in named]
    if unknown or not found:
        names = sorted({name.rpartition(".")[2] for name, module in linear.items() if not isinstance(module, nn.Embedding)})
        rule, fix = "must name linear layers of the model", f"It has {', '.join(names)}."
        if isinstance(targets, str):
            rule = "is a regular expression, and must match whole names of the model's linear layers"
            fix = f"Names are a list, adapter.targets=[{targets}]. {fix}"
        raise ConfigError("adapter.targets", rule, got=unknown or targets, fix=fix)
    if never := sorted(passed_over & found.keys()):
        rule = "must leave out layers that are not called: their model reads their weights, or takes more from them than products"
        raise ConfigError("adapter.targets", rule, got=never[0], fix="Leave them out, or set adapter.targets=all-linear.")
    return _of_layers(model, section, found)


def _takes_as_given(model: PreTrainedModel, section: Layered, layers: Layers) -> bool:
    """Whether PEFT puts adapters on the same layers where it gets adapter.targets as it is. It matches expressions with every
    module, also with those that are no layers, and last parts of names with the towers of a whole multimodal model."""
    targets = section.targets
    if is_multimodal(model.config):
        return False
    if targets == ALL_LINEAR:
        return section.last_layers is None and section.layers is None and not _passed_over(model)
    named = {name for name, _ in _of_base(model) if name.rpartition(".")[2] in targets}
    return not isinstance(targets, str) and named == layers.keys()


def expert_weights(model: PreTrainedModel, section: Layered, rank: int) -> list[str]:
    """The names of the weights [E, N, K] of a mixture's experts. Raises ConfigError for a model without any, and a rank above
    theirs."""
    found = _of_layers(model, section, _expert_weights(model))
    if not found:
        rule = f"must be false for {model.config.model_type}, which has no experts in one tensor"
        raise ConfigError("adapter.experts", rule, got=True, fix="Leave it out.")
    short = min(min(weight.shape[1:]) for weight in found.values())
    if rank > short:
        raise ConfigError("adapter.rank", f"must be at most {short}, the smaller side of an expert", got=rank, fix="Lower it.")
    return sorted(found)


def _expert_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{own}": weight
        for name, module in _of_base(model)
        if not isinstance(module, nn.Conv1d)
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    }


def _without_experts_names(model: PreTrainedModel, layers: Layers, section: Layered) -> Layers:
    """Without linear layers that are called as experts were before their weights were one tensor, or as the stored weights of
    others: PEFT takes them for these, and so they have no adapter. Raises ConfigError where one of them is named."""
    last = {name: name.rpartition(".")[2] for name in layers}
    stored = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    renamed = {name for name in layers if rename_source_key(f"{name}.weight", stored, [])[0] != f"{name}.weight"}
    experts = {part for part in set(last.values()) if _is_experts_name(model, part)}
    taken = {name for name in layers if last[name] in experts or name in renamed}
    if taken and section.targets != ALL_LINEAR:
        named = ", ".join(sorted({last[name] for name in taken}))
        rule = f"can't name {named} of {model.config.model_type}: PEFT takes them for parts of its experts"
        fix = "Leave them out; adapter.experts=true puts an adapter on each expert."
        raise ConfigError("adapter.targets", rule, got=section.targets, fix=fix)
    return {name: layer for name, layer in layers.items() if name not in taken}


def _is_experts_name(model: PreTrainedModel, part: str) -> bool:
    probe = LoraConfig(target_modules=[part])
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # one of two that became one
        return True
    return part not in (probe.target_modules or ())


def _of_layers(model: PreTrainedModel, section: Layered, found: dict[str, T]) -> dict[str, T]:
    """Those of the modules `found`, by name, that are in the layers that adapter.last_layers or adapter.layers names."""
    last, names = section.last_layers, [name for name, _ in named_layers(model)]
    numbers = section.layers if last is None else range(max(len(names) - last, 0), len(names))
    if numbers is None:
        return found
    chosen = tuple(f"{names[number]}." for number in layer_numbers(numbers, len(names)))
    of_layers = tuple(f"{name}." for name in names)  # what lies outside of them, as embeddings do, was asked for by name
    return {name: module for name, module in found.items() if name.startswith(chosen) or not name.startswith(of_layers)}


def _passed_over(model: PreTrainedModel) -> set[str]:
    """Names of linear layers that can't have an adapter."""
    modules = dict(_of_base(model))
    places = ((name, *name.rpartition(".")[::2]) for name, module in modules.items() if isinstance(module, LINEAR))
    return {name for name, parent, last in places if is_passed_over(modules[parent], last, modules[name])}


def _pattern(targets: str | list[str]) -> Callable[[str], bool]:
    if not isinstance(targets, str):
        return lambda name: name.rpartition(".")[2] in targets
    try:
        pattern = re.compile(targets)
    except re.error as error:
        fix = f"It is none: {error}. Names of layers are a list, [{targets}]."
        raise ConfigError("adapter.targets", "must be a list, all-linear or a regular expression", got=targets, fix=fix) from None
    return lambda name: pattern.fullmatch(name) is not None


def layer_numbers(numbers: Sequence[int], num_layers: int) -> list[int]:
    """The numbers of layers from 0, in order. Raises ConfigError for one that the model has not."""
    unknown = [number for number in numbers if not -num_layers <= number < num_layers]
    if unknown or not numbers:
        rule = f"must be numbers of the model's {num_layers} layers, from 0 to {num_layers - 1} or from -{num_layers} to -1"
        raise ConfigError("adapter.layers", rule, got=unknown or list(numbers))
    return sorted({number % num_layers for number in numbers})


def whole_modules(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The whole names of the modules with these last parts: of parts, PEFT would take any end of a name (norm for layernorm)."""
    modules = {name: module for name, module in _of_base(model) if any(True for _ in module.parameters())}
    last = {name.rpartition(".")[2] for name in modules}
    if unknown := [name for name in names if name not in last]:
        fix = f"It has {', '.join(sorted(name for name in last if name and not name.isdigit()))}."
        raise ConfigError("adapter.modules_to_save", "must name modules of the model", got=unknown, fix=fix)
    both_ends = {name.rpartition(".")[2] for name in tied_ends(model)}
    if named := sorted(both_ends & set(names)):
        rule = "can't name an embedding that is tied to the head: PEFT would train a copy of one of them"
        fix = "Set adapter.targets to name it, for an adapter on it, or adapter=freeze with adapter.extra_modules."
        raise ConfigError("adapter.modules_to_save", rule, got=named, fix=fix)
    return [name for name in modules if name.rpartition(".")[2] in names]


def tied_ends(model: PreTrainedModel) -> set[str]:
    """The names of the embedding and the head where they are one weight; else none."""
    if not ties_ends(model.config):
        return set()
    ends = {base_of(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    return {name for name, module in _of_base(model) if module in ends}


def ties_ends(config: PretrainedConfig) -> bool:
    """Whether the head's weight is the embedding's. Some models say it of the whole model alone, others of its text."""
    return any(getattr(one, "tie_word_embeddings", False) for one in (config, config.get_text_config()))


def base_of(module: nn.Module) -> nn.Module:
    """The layer under an adapter; a layer without one itself."""
    return module.get_submodule("base_layer") if isinstance(module, BaseTunerLayer | BankedLinear) else module


def _of_base(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model by their names there, whatever adapters lie around them."""
    yield name, base_of(module)
    if base_of(module) is not module:
        return
    for child_name, child in module.named_children():
        yield from _of_base(child, f"{name}.{child_name}".removeprefix("."))


def only_linear(layers: Layers, kind: str) -> None:
    """Raises ConfigError for an embedding."""
    if embeddings := sorted(name for name, layer in layers.items() if isinstance(layer, nn.Embedding)):
        fix = "Set adapter=lora, or leave it out."
        raise ConfigError("adapter.targets", f"must name linear layers with adapter={kind}", got=embeddings, fix=fix)


def sides(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, Conv1D)
    return layer.nx, layer.nf

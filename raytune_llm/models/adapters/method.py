"""The interface of adapter methods, and the choice of the layers that get an adapter."""

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
"""The tensors of an adapter's file, by name."""
ALL_LINEAR = "all-linear"
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """The activations that the method's layers save for the backward pass. The defaults are those of grouped LoRA
    (grouped.py)."""

    alone: bool = False
    """Whether PEFT computes each layer by itself, without recomputation."""
    inputs: bool = True
    """Whether each layer's input is saved."""
    outputs: float = 0
    """The number of saved elements per element of all linear layers' outputs."""
    converts: bool = False
    """Whether each layer saves its own converted copy of the input."""
    multiplied: bool = False
    """Whether trained vectors multiply outputs [N, 1], which are saved as they are, and inputs [1, K], which are saved in
    float32."""
    drops_inputs: bool = True
    """Whether adapter.dropout applies to the input."""


@dataclass(frozen=True)
class Method:
    """One adapter method, such as LoRA."""

    config: Callable[..., PeftConfig]
    """(**settings of its section that are not in Layered) -> PEFT's config."""
    describes: Callable[[PeftConfig], bool]
    """(config of a saved adapter) -> whether it is of this method."""
    check: Callable[..., None]
    """(layers, **settings): raises ConfigError if the settings don't fit one of the layers."""
    continues: Callable[[PeftConfig, Layered], None] = lambda saved, section: None
    """(config of a saved adapter of this method, section): sets the section's dropout. Raises ConfigError if the section
    contradicts the config."""
    begin: Callable[[nn.Module, str, Quantization | None], None] = lambda model, key, quantization: None
    """(model, PEFT's name of the adapter, quantization to come): initializes a new adapter once it is in the layers."""
    placed: Callable[[nn.Module, str], None] = lambda model, key: None
    """(model, PEFT's name of the adapter): replaces PEFT's layers by faster ones, for new and saved adapters."""
    quantized: Callable[..., None] = lambda model, key, *, new: None
    """(model, PEFT's name of the adapter, new=whether it is new): called after the layers under it were quantized, if any
    were."""
    observer: Callable[[nn.Module, str], Observer] | None = None
    """(model, PEFT's name of the adapter) -> an observer of layers' inputs, for methods that initialize new adapters from
    these."""
    saved: Callable[[PeftConfig, Tensors, Tensors], tuple[PeftConfig, Tensors]] | None = None
    """(config, tensors, initial tensors) -> the config and tensors to save instead. None: saved unchanged."""
    lr_factor: Callable[[str, Layered], float] = lambda name, section: 1.0
    """(parameter name, section) -> the factor of its learning rate."""
    kept: Kept = Kept()


def new_config(model: PreTrainedModel, section: Layered, method: Method) -> tuple[PeftConfig, Layers]:
    """PEFT's config of a new adapter, and the layers that get it. Raises ConfigError for settings that don't fit the model."""
    of_all = {name: getattr(section, name) for name in PLACEMENT}
    settings = {name: value for name, value in settings_of(section).items() if name not in of_all}
    experts = expert_weights(model, section, settings["rank"]) if settings.pop("experts", False) else []
    config: Any = method.config(**settings)
    whole = whole_modules(model, section.modules_to_save)
    layers, targets = _outside_of(whole, targeted(model, section), section), section.targets
    is_mixture = config.peft_type == PeftType.LORA and _is_mixture(model, layers)
    if is_mixture:
        layers = _without_experts_names(model, layers, section)
    if section.changes_base and (named := sorted(tied_ends(model) & layers.keys())):
        rule = f"can't name {named[0]}, which is tied to the embedding: this adapter changes the weights of its layers"
        raise ConfigError("adapter.targets", rule, got=section.targets, fix="Leave it out, or set adapter=lora.")
    method.check(layers, **settings)
    if is_mixture:  # PEFT turns all-linear and expressions into last parts of names, which match experts and routers too
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
"""The settings that choose layers, in every section of such methods."""


def targeted(model: PreTrainedModel, section: Layered) -> Layers:
    """The linear layers that adapter.targets names, within the layers of adapter.last_layers or adapter.layers. Raises
    ConfigError for a name that no layer has."""
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
        rule = "can't name layers whose weights the model reads directly, past an adapter"
        raise ConfigError("adapter.targets", rule, got=never[0], fix="Leave them out, or set adapter.targets=all-linear.")
    return _of_layers(model, section, found)


def _takes_as_given(model: PreTrainedModel, section: Layered, layers: Layers) -> bool:
    """Whether PEFT would choose the same layers from adapter.targets unchanged. It matches expressions with all modules, not only
    with layers, and last parts of names also with the towers of a multimodal model."""
    targets = section.targets
    if is_multimodal(model.config):
        return False
    if targets == ALL_LINEAR:
        return section.last_layers is None and section.layers is None and not _passed_over(model)
    named = {name for name, _ in _of_base(model) if name.rpartition(".")[2] in targets}
    return not isinstance(targets, str) and named == layers.keys()


def _outside_of(whole: Sequence[str], layers: Layers, section: Layered) -> Layers:
    """`layers` outside of the modules that are trained in full. Raises ConfigError if adapter.targets names one in them, or if no
    layer is left."""
    inside = {name for name in layers if any(f"{name}.".startswith(f"{module}.") for module in whole)}
    if inside and (section.targets != ALL_LINEAR or len(inside) == len(layers)):
        named = ", ".join(sorted({name.rpartition(".")[2] for name in inside}))
        rule = f"can't be, or contain, layers that adapter.targets names: {named}"
        fix = "Leave them out of one of the two, or set adapter=freeze to train modules in full alone."
        raise ConfigError("adapter.modules_to_save", rule, got=section.modules_to_save, fix=fix)
    return {name: layer for name, layer in layers.items() if name not in inside}


def _is_mixture(model: PreTrainedModel, layers: Layers) -> bool:
    """Whether the model has experts, or is of a family whose experts' names PEFT would see in the names of these layers (a model
    of such a family may have dense layers only)."""
    return bool(_expert_weights(model)) or any(_is_experts_name(model, name) for name in {n.rpartition(".")[2] for n in layers})


def expert_weights(model: PreTrainedModel, section: Layered, rank: int) -> list[str]:
    """The names of the experts' weights [E, N, K] of a mixture. Raises ConfigError if there are none, or if the rank is above
    min(N, K)."""
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
    """`layers` without linear layers whose names experts have in files or had before their weights became one tensor. PEFT would
    take them for experts, so they can't have adapters. Raises ConfigError if adapter.targets names one."""
    last = {name: name.rpartition(".")[2] for name in layers}
    stored = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    renamed = {name for name in layers if rename_source_key(f"{name}.weight", stored, [])[0] != f"{name}.weight"}
    experts = {part for part in set(last.values()) if _is_experts_name(model, part)}
    taken = {name for name in layers if last[name] in experts or name in renamed}
    if taken and section.targets != ALL_LINEAR:
        named = ", ".join(sorted({last[name] for name in taken}))
        rule = f"can't name {named} of {model.config.model_type}: PEFT takes them for parts of its experts"
        fix = "Leave them out."
        if _expert_weights(model):
            fix = "Leave them out; adapter.experts=true puts an adapter on each expert."
        raise ConfigError("adapter.targets", rule, got=section.targets, fix=fix)
    return {name: layer for name, layer in layers.items() if name not in taken}


def _is_experts_name(model: PreTrainedModel, part: str) -> bool:
    probe = LoraConfig(target_modules=[part])
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # one of two weights that were fused into one
        return True
    return part not in (probe.target_modules or ())


def _of_layers(model: PreTrainedModel, section: Layered, found: dict[str, T]) -> dict[str, T]:
    """The modules of `found` (name -> module) within the layers of adapter.last_layers or adapter.layers."""
    last, names = section.last_layers, [name for name, _ in named_layers(model)]
    numbers = section.layers if last is None else range(max(len(names) - last, 0), len(names))
    if numbers is None:
        return found
    chosen = tuple(f"{names[number]}." for number in layer_numbers(numbers, len(names)))
    of_layers = tuple(f"{name}." for name in names)  # modules outside of layers (embeddings) were named explicitly
    return {name: module for name, module in found.items() if name.startswith(chosen) or not name.startswith(of_layers)}


def _passed_over(model: PreTrainedModel) -> set[str]:
    """The names of linear layers that can't have an adapter."""
    modules = dict(_of_base(model))
    places = ((name, *name.rpartition(".")[::2]) for name, module in modules.items() if isinstance(module, LINEAR))
    return {name for name, parent, last in places if is_passed_over(modules[parent], last, modules[name])}


def _pattern(targets: str | list[str]) -> Callable[[str], bool]:
    if not isinstance(targets, str):
        return lambda name: name.rpartition(".")[2] in targets
    try:
        pattern = re.compile(targets)
    except re.error as error:
        fix = f"As a regular expression it is invalid: {error}. For names of layers, give a list: [{targets}]."
        raise ConfigError("adapter.targets", "must be a list, all-linear or a regular expression", got=targets, fix=fix) from None
    return lambda name: pattern.fullmatch(name) is not None


def layer_numbers(numbers: Sequence[int], num_layers: int) -> list[int]:
    """The layer numbers from 0, in ascending order, with negative ones resolved. Raises ConfigError for a layer that does not
    exist."""
    unknown = [number for number in numbers if not -num_layers <= number < num_layers]
    if unknown or not numbers:
        rule = f"must be numbers of the model's {num_layers} layers, from 0 to {num_layers - 1} or from -{num_layers} to -1"
        raise ConfigError("adapter.layers", rule, got=unknown or list(numbers))
    return sorted({number % num_layers for number in numbers})


def whole_modules(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The full names of the modules with these last parts. PEFT would match any ending (norm also matches layernorm)."""
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
    """The names of the embedding and the head if they are tied; else none."""
    if not ties_ends(model.config):
        return set()
    ends = {base_of(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    return {name for name, module in _of_base(model) if module in ends}


def ties_ends(config: PretrainedConfig) -> bool:
    """Whether the head is tied to the embedding. Some multimodal configs say it at the top, others in their text config."""
    return any(getattr(one, "tie_word_embeddings", False) for one in (config, config.get_text_config()))


def base_of(module: nn.Module) -> nn.Module:
    """The layer under an adapter; the layer itself if it has none."""
    return module.get_submodule("base_layer") if isinstance(module, BaseTunerLayer | BankedLinear) else module


def _of_base(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model with their names there, without the wrappers of adapters."""
    yield name, base_of(module)
    if base_of(module) is not module:
        return
    for child_name, child in module.named_children():
        yield from _of_base(child, f"{name}.{child_name}".removeprefix("."))


def only_linear(layers: Layers, kind: str) -> None:
    """Raises ConfigError if a layer is an embedding."""
    if embeddings := sorted(name for name, layer in layers.items() if isinstance(layer, nn.Embedding)):
        fix = "Set adapter=lora, or leave it out."
        raise ConfigError("adapter.targets", f"must name linear layers with adapter={kind}", got=embeddings, fix=fix)


def sides(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of the layer."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, Conv1D)
    return layer.nx, layer.nf

"""Weights, or their products, in fewer bits: name -> the quantization. Results stay in the activations' type.

The layers under adapters are replaced after those are in place, so PEFT's own layers carry on around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.section import settings_of
from raytune_llm.errors import ConfigError
from raytune_llm.models.quantization.base import Quantization, QuantizedLinear
from raytune_llm.models.quantization.fp4 import FP4
from raytune_llm.models.quantization.fp8 import FP8
from raytune_llm.models.quantization.hqq import HQQ
from raytune_llm.models.quantization.int8 import Int8
from raytune_llm.models.quantization.linears import Found, frozen_experts, linears_but, names_of_linears
from raytune_llm.models.quantization.nf4 import NF4, packed_shapes
from raytune_llm.models.stored import Stored

__all__ = [
    "QUANTIZATIONS",
    "Quantization",
    "QuantizedLinear",
    "check_device",
    "check_layers",
    "described",
    "frozen_experts",
    "linears_but",
    "packed_shapes",
    "quantization_of",
    "quantize",
]

QUANTIZATIONS: dict[str, type[Quantization] | None] = {
    "none": None,
    "fp8": FP8,
    "bnb_nf4": NF4,
    "bnb_fp4": FP4,
    "bnb_int8": Int8,
    "hqq": HQQ,
}


def quantization_of(section: QuantizationConfig) -> Quantization | None:
    """The quantization that the section chooses; None if nothing is quantized."""
    kind = QUANTIZATIONS[section.name]
    return None if kind is None else kind(**settings_of(section))


def check_device(section: QuantizationConfig, device: torch.device) -> None:
    """Raises ConfigError if this machine's device does not support the quantization."""
    quantization = quantization_of(section)
    if quantization is None:
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    lacking = quantization.lacks(device.type, capability)
    if lacking is not None:
        raise ConfigError("quantization", f"can't be {section.name} here: {lacking}", fix="Set quantization=none.")
    if quantization.package is not None and find_spec(quantization.package) is None:
        rule = f"can't be {section.name} here: {quantization.package} is not installed"
        raise ConfigError("quantization", rule, fix=f"Install it: pip install 'raytune-llm[{quantization.extra}]'.")


def check_layers(layers: Iterable[nn.Module], section: QuantizationConfig) -> None:
    """Raises ConfigError for layers, with weights or without, that the quantization can't hold."""
    quantization = quantization_of(section)
    if quantization is not None:
        _replaced(list(layers), quantization, section.name)


def _replaced(layers: Sequence[nn.Module], quantization: Quantization, name: str) -> tuple[list[Found], type[nn.Module]]:
    """The linear layers that are replaced: the frozen ones, or all where all are trained; and by what. Raises ConfigError."""
    linears = linears_but(layers, quantization.skip_modules)
    experts = frozen_experts(layers)
    if experts and quantization.replaces_experts is None:
        able = ", ".join(
            option for option, kind in QUANTIZATIONS.items() if kind is not None and kind.replaces_experts is not None
        )
        rule = f"must be {able} or none for mixtures of experts, whose experts are one tensor, not linear layers"
        raise ConfigError("quantization", rule, got=name, fix="Set quantization=bnb_nf4.")
    if not linears and not experts:
        fix = "Set quantization=none, or name fewer in quantization.skip_modules."
        raise ConfigError("quantization", "finds no linear layer to quantize", got=name, fix=fix)
    frozen = [found for found in linears if not found[2].weight.requires_grad]
    if not frozen and quantization.trained_layer is None:
        raise ConfigError("quantization", "needs frozen weights", got=name, fix="Set adapter=lora, or quantization=none.")
    replaced = frozen or linears
    if misfits := [why for *_, linear in replaced if (why := quantization.misfit(linear)) is not None]:
        rule = f"can't be {name} for every layer: {misfits[0]}"
        raise ConfigError("quantization", rule, fix="Set quantization=none.")
    in_place = quantization.layer if frozen else quantization.trained_layer
    assert in_place is not None
    return replaced, in_place


def quantize(layers: Iterable[nn.Module], section: QuantizationConfig, runs_on: torch.device) -> None:
    """Replace the linear layers inside `layers`, but those that the section skips: the frozen ones, which are packed where they
    run, or all where all are trained."""
    quantization = quantization_of(section)
    if quantization is None:
        return
    layers = list(layers)
    replaced, in_place = _replaced(layers, quantization, section.name)
    check_device(section, runs_on)
    experts = frozen_experts(layers)
    replace(replaced, in_place, None if in_place is quantization.trained_layer else runs_on)
    for module, name in experts:
        assert quantization.replaces_experts is not None
        setattr(module, name, _on(module.get_parameter(name), runs_on))
        quantization.replaces_experts(module, name)
    if runs_on.type == "cuda":
        torch.cuda.empty_cache()  # what held the weights as they were loaded


def replace(linears: list[Found], kind: Callable[[nn.Linear], nn.Module], reads_to: torch.device | None) -> None:
    """A layer at a time, and the list forgets it, so that its weight goes. A weight that is in a file or in other memory comes to
    this device just before; without one it stays there, for a strategy to read."""
    while linears:
        parent, name, linear = linears.pop()
        if reads_to is not None:
            linear.weight = _on(linear.weight, reads_to)
        setattr(parent, name, kind(linear))


def _on(weight: Any, device: torch.device) -> nn.Parameter:
    """The frozen parameter on the device, read from its file if it is not in memory yet."""
    if isinstance(weight, Stored):
        return weight.read(device)
    return weight if weight.device == device else nn.Parameter(weight.detach().to(device), requires_grad=False)


def described(layers: Iterable[nn.Module], section: QuantizationConfig) -> str | None:
    """A sentence for the log: how many layers were replaced, and which were not; None without quantization."""
    quantization = quantization_of(section)
    if quantization is None:
        return None
    kinds = tuple(kind for kind in (quantization.layer, quantization.trained_layer) if kind is not None)
    layers = list(layers)
    taken = [x for layer in layers for x in layer.modules() if isinstance(x, kinds)]
    packed = sum(parametrize.is_parametrized(x) for layer in layers for x in layer.modules())
    left = names_of_linears(layers)
    but = f", not for {', '.join(left)}" if left else ""
    of_experts = f" and the experts of {packed} layers" if packed else ""
    return f"{section.name} for {len(taken)} linear layers{of_experts}{but}" if taken or packed else None

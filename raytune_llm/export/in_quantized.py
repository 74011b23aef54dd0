"""The base for `export.into_quantized`, which merges adapters into dequantized weights.

They are read tensor by tensor: quantized weights from the base's files, or original weights that are quantized and dequantized as
in the run's training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.errors import ConfigError
from raytune_llm.export.tensors import TensorFact, Tensors
from raytune_llm.models.adapters.method import tied_ends
from raytune_llm.models.layers import layers
from raytune_llm.models.load import load_model
from raytune_llm.models.quantization import Quantization, check_device, frozen_experts, linears_but, quantization_of
from raytune_llm.models.quantization.formats import FORMATS, Format, method_of
from raytune_llm.models.quantization.formats.compressed import CompressedTensors

SETTING = "export.into_quantized"
BY_LAYER: dict[str, type[Format]] = {**FORMATS, "compressed-tensors": CompressedTensors}
"""Method -> format, for methods with which a single layer's weight can be read."""


class Unpacked:
    """Files of quantized weights, read as dequantized float32 tensors."""

    def __init__(self, files: Tensors, format: Format, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        """shapes: of the model's weights. dtype: of the quantized weights after dequantizing."""
        self._files, self._format = files, format
        self._parts: dict[str, dict[str, str]] = {}
        """Weight -> {part: name in the files}."""
        for name in (name for name in shapes if name.endswith(".weight")):
            layer = name.removesuffix("weight")
            parts = {part: layer + part for part in format.PARTS if layer + part in files.facts}
            if parts.keys() - {"weight"}:
                self._parts[name] = parts
        whose = {stored: name for name, parts in self._parts.items() for stored in parts.values()}
        self.facts: dict[str, TensorFact] = {}
        for stored, fact in files.facts.items():
            name = whose.get(stored)
            self.facts[name or stored] = fact if name is None else TensorFact(name, tuple(shapes[name]), dtype)

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._files.read(name)
        held = {part: self._files.read(stored) for part, stored in self._parts[name].items()}
        return self._format.weight(held).reshape(self.facts[name].shape)


class Rounded:
    """Files of original weights, of which a quantization's layers are read quantized and dequantized, in float32."""

    def __init__(self, files: Tensors, quantization: Quantization, weights: frozenset[str]) -> None:
        self._files, self._quantization, self._weights = files, quantization, weights
        self.facts = files.facts

    def read(self, name: str) -> Tensor:
        weight = self._files.read(name)
        return self._quantization.held(weight.float()) if name in self._weights else weight


def in_quantized(
    files: Tensors, config: PretrainedConfig, trained_in: QuantizationConfig | None, place: str, *, trust_remote_code: bool
) -> tuple[Tensors, str]:
    """The base's tensors, and a sentence about them for the card. config: the base's. trained_in: the quantization of the run.
    place: the base's folder. Raises ConfigError if neither is quantized, or if single layers can't be read."""
    model = base_in_bits(config, trained_in, place, trust_remote_code=trust_remote_code)
    given = _stored_in(config)
    if given is not None:
        return _unpacked(files, model, given, place)
    assert trained_in is not None
    return _rounded(files, model, trained_in)


def base_in_bits(
    config: PretrainedConfig, trained_in: QuantizationConfig | None, place: str, *, trust_remote_code: bool
) -> PreTrainedModel:
    """The base without weights. Raises ConfigError if its config already shows that `in_quantized` would."""
    given = _stored_in(config)
    if given is not None:
        _check_format(given, config.model_type, place)
    elif trained_in is None or quantization_of(trained_in) is None:
        rule = "is for a base whose files are quantized, or for a run with a quantization"
        raise ConfigError(SETTING, rule, got=True, fix="Leave it out.")
    else:
        check_device(trained_in, torch.device("cpu"))
    model = load_model(
        without_quantization(config),
        None,
        weights="random",
        dtype=torch.float32,
        seed=0,
        device="meta",
        trust_remote_code=trust_remote_code,
    ).requires_grad_(False)
    if frozen_experts(layers(model)):
        if given is None:
            raise ConfigError(SETTING, "must be false for a mixture of experts", got=True, fix="Leave it out.")
        rule = "must have files whose layers can be unpacked one by one, which experts of a mixture can't"
        raise ConfigError("model.path", rule, got=place, fix="Name the model that it was quantized from.")
    return model


def _stored_in(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """The quantization_config of the files; None if they are not quantized."""
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return None
    given = given if isinstance(given, dict) else given.to_dict()
    return given.get("stored", given)


def is_quantized(config: PretrainedConfig) -> bool:
    """Whether the files have quantized weights."""
    return getattr(config, "quantization_config", None) is not None


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        delattr(plain, "quantization_config")
    return plain


def _check_format(given: Mapping[str, Any], model_type: str, place: str) -> None:
    """given: the quantization_config."""
    method = method_of(given)
    kind = BY_LAYER.get(method)
    if kind is None:
        rule = f"must hold weights by {', '.join(BY_LAYER)} with {SETTING}=true; these are by {method}"
        raise ConfigError("model.path", rule, got=place, fix="Name the model that it was quantized from.")
    if kind.package is not None and find_spec(kind.package[0]) is None:
        rule = f"holds weights by {method}, which needs {kind.package[0]} to be read"
        raise ConfigError("model.path", rule, got=place, fix=f"Install it: pip install '{kind.package[1]}'.")
    if (lacking := kind.lacks(given, model_type)) is not None:
        rule = f"holds weights by {method} that can't be read here: {lacking}"
        raise ConfigError("model.path", rule, got=place, fix="Name the model that it was quantized from.")


def _unpacked(files: Tensors, model: PreTrainedModel, given: Mapping[str, Any], place: str) -> tuple[Tensors, str]:
    """given: the quantization_config."""
    method, config = method_of(given), model.config
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    unpacked = Unpacked(files, BY_LAYER[method].of(given), shapes, dtype)
    tied = {f"{name}.weight" for name in tied_ends(model)}
    if missing := sorted(shapes.keys() - unpacked.facts.keys() - tied):
        rule = f"must have files whose layers can be unpacked one by one: they have no {missing[0]}"
        raise ConfigError("model.path", rule, got=place, fix="Name the model that it was quantized from.")
    return (
        unpacked,
        f"The base's weights are dequantized from its files ({method}), and so include the error of that quantization.",
    )


def _rounded(files: Tensors, model: PreTrainedModel, section: QuantizationConfig) -> tuple[Tensors, str]:
    quantization = quantization_of(section)
    assert quantization is not None
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    weights = frozenset(names[linear] for *_, linear in linears_but(layers(model), quantization.skip_modules))
    return Rounded(files, quantization, weights), (
        f"The base's weights were quantized and dequantized by quantization={section.name}, as in the run's training. "
        "They are compared with the original ones."
    )

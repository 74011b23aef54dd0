"""The matrices that a quantized export quantizes: all linear layers except the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from raytune_llm.errors import ConfigError
from raytune_llm.export.in_quantized import is_quantized
from raytune_llm.export.source import Source


@dataclass(frozen=True)
class Matrices:
    layers: Sequence[str]
    """Names of linear layers, whose weights [N, K] are quantized."""
    skipped: Sequence[str]
    """Names of linear layers that keep their precision."""
    widths: Sequence[int]
    """The columns K that occur, sorted."""


def matrices_of(source: Source, format: str) -> Matrices:
    """The matrices of the source. Raises ConfigError for a model for which quantized exports are not supported."""
    got = str(source.folder)
    if source.scores:
        raise _refused(format, "for a reward model", got)
    if is_quantized(source.config):
        fix = "Export the model that it was quantized from, or set export.into_quantized=true."
        raise ConfigError("export.format", f"can't be {format} for weights that are quantized already", got=got, fix=fix)
    try:
        with torch.device("meta"):
            code = source.model.trust_remote_code
            model: Any = AutoModelForCausalLM.from_config(source.config, trust_remote_code=code)
    except ValueError:
        what = f"for {source.config.model_type}, which transformers has no causal language model of"
        raise _refused(format, what, got) from None
    if any(parameter.ndim == 3 for parameter in model.parameters()):
        raise _refused(format, "for a mixture of experts, whose experts are not linear layers in transformers", got)
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    layers = [name for name, module in linears.items() if module is not head]
    if not layers:
        raise _refused(format, f"for {source.config.model_type}, which has no linear layers", got)
    if unknown := [name for name in layers if f"{name}.weight" not in source.facts]:
        what = f"for {source.config.model_type}: its files have another name for {unknown[0]}.weight"
        raise _refused(format, what, got)
    widths = sorted({linears[name].in_features for name in layers})
    return Matrices(layers, [name for name, module in linears.items() if module is head], widths)


def _refused(format: str, what: str, got: str) -> ConfigError:
    return ConfigError("export.format", f"can't be {format} {what}", got=got, fix="Export it as hf.")

"""Vectors that outputs, or inputs, of layers are multiplied with (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

import re

from peft import IA3Config, PeftConfig

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import Kept, Layers, Method, only_linear


def ia3(*, scaled_inputs: list[str]) -> IA3Config:
    # A pattern: of a list, PEFT demands that the targets have the same entries, which they have not where they are patterns.
    names = "|".join(map(re.escape, scaled_inputs))
    return IA3Config(feedforward_modules=rf".*\.({names})" if scaled_inputs else [])


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, IA3Config)


def check(layers: Layers, *, scaled_inputs: list[str]) -> None:
    only_linear(layers, "ia3")
    if unknown := sorted(set(scaled_inputs) - {name.rpartition(".")[2] for name in layers}):
        raise ConfigError("adapter.scaled_inputs", "must name some of adapter.targets", got=unknown, fix="Add them there.")


KEPT = Kept(alone=True, inputs=False, outputs=0.25)
"""What the base layer gave, of keys and values, and the input of the MLP's last layer, for the vectors' gradients."""
IA3 = Method(config=ia3, describes=describes, check=check, kept=KEPT)

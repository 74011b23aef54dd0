"""IA3: trained vectors that multiply the outputs or inputs of layers (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

import re

from peft import IA3Config, PeftConfig

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import Kept, Layers, Method, only_linear


def ia3(*, scaled_inputs: list[str]) -> IA3Config:
    # A regular expression, because PEFT requires that entries of a list also occur in the targets, which may be an expression.
    names = "|".join(map(re.escape, scaled_inputs))
    return IA3Config(feedforward_modules=rf".*\.({names})" if scaled_inputs else [])


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, IA3Config)


def check(layers: Layers, *, scaled_inputs: list[str]) -> None:
    only_linear(layers, "ia3")
    if unknown := sorted(set(scaled_inputs) - {name.rpartition(".")[2] for name in layers}):
        raise ConfigError("adapter.scaled_inputs", "must name some of adapter.targets", got=unknown, fix="Add them there.")


KEPT = Kept(alone=True, inputs=False, multiplied=True)
IA3 = Method(config=ia3, describes=describes, check=check, kept=KEPT)

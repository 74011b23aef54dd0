"""Low-rank adapters: W + scale B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import Layers, Method, sides

GATE_OUTPUTS, GATE_RATIO = 64, 16
"""The most outputs of a gate, and the least inputs for each: all-linear takes gates with the others, at any rank of these."""


def lora(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    **variant: bool,
) -> LoraConfig:
    """The scale is alpha / rank. variant: what PEFT calls the ways of computing it."""
    patterns: Any = {"rank_pattern": dict(rank_pattern), "alpha_pattern": dict(alpha_pattern)}
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **patterns, **variant)  # type: ignore[arg-type]  # whole or not


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, LoraConfig) and not saved.use_rslora and not saved.use_dora


def ranks_fit(
    layers: Layers,
    *,
    rank: int,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    spares_gates: bool = True,
    **settings: Any,
) -> None:
    """Raise ConfigError unless each rank is at most min(N, K) of its layer [N, K], the highest that B A can have, and each
    pattern names layers. spares_gates: of gates, which have a few outputs, it may be higher."""
    for setting, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        used = {get_pattern_key(list(patterns), name) for name in layers}
        if unused := sorted(patterns.keys() - used):
            rule = "must name, each of them, layers that get an adapter, by the end of their names"
            fix = f"They are {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}."
            raise ConfigError(f"adapter.{setting}", rule, got=unused, fix=fix)
    for name, layer in layers.items():
        key, short = get_pattern_key(list(rank_pattern), name), min(sides(layer))
        setting, own = ("rank_pattern", rank_pattern[key]) if key in rank_pattern else ("rank", rank)
        if own > short and not (spares_gates and is_gate(layer)):
            last = name.rpartition(".")[2]
            fix = "Lower it." if setting == "rank_pattern" else f"Lower it, or set adapter.rank_pattern={{{last}: {short}}}."
            raise ConfigError(f"adapter.{setting}", f"must be at most {short}, the smaller side of {last}", got=own, fix=fix)


def is_gate(layer: nn.Module) -> bool:
    """A linear layer that gives a number for each head or expert, with which others are multiplied."""
    inputs, outputs = sides(layer)
    return not isinstance(layer, nn.Embedding) and outputs <= GATE_OUTPUTS and inputs >= GATE_RATIO * outputs


LORA = Method(config=lora, describes=describes, check=ranks_fit)

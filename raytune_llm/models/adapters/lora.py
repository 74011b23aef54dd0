"""Low-rank adapters: W + scale B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import Layers, Method, sides

GATE = 16
"""A layer with at least this ratio of its sides is a gate (of experts, for example), whose smaller side may be below the rank."""


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
    layers: Layers, *, rank: int, rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float], **settings: Any
) -> None:
    """Raise ConfigError unless each rank is at most min(N, K) of its layer [N, K], the highest that B A can have, and each
    pattern names layers."""
    for setting, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        used = {get_pattern_key(list(patterns), name) for name in layers}
        if unused := sorted(patterns.keys() - used):
            rule = "must name, each of them, layers that get an adapter, by the end of their names"
            fix = f"They are {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}."
            raise ConfigError(f"adapter.{setting}", rule, got=unused, fix=fix)
    for name, layer in layers.items():
        key = get_pattern_key(list(rank_pattern), name)
        check_rank(name, layer, rank_pattern.get(key, rank), "rank_pattern" if key in rank_pattern else "rank", gate=GATE)


def check_rank(name: str, layer: Any, rank: int, setting: str, *, gate: float) -> None:
    short, long = sorted(sides(layer))
    if short < rank and long < gate * short:
        last = name.rpartition(".")[2]
        raise ConfigError(f"adapter.{setting}", f"must be at most {short}, the smaller side of {last}", got=rank, fix="Lower it.")


LORA = Method(config=lora, describes=describes, check=ranks_fit)

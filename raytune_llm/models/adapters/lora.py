"""Low-rank adapters: W + scale B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import Layers, Method, sides

GATE = 16
"""A layer with at least this ratio of its sides is a gate (of experts, for example), whose smaller side may be below the rank."""


def lora(*, rank: int, alpha: float, dropout: float, **variant: bool) -> LoraConfig:
    """The scale is alpha / rank. variant: what PEFT calls the ways of computing it."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **variant)  # type: ignore[arg-type]  # whole or not


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, LoraConfig) and not saved.use_rslora and not saved.use_dora


def rank_fits(layers: Layers, *, rank: int, **settings: float) -> None:
    """Of a layer [N, K], B A has rank min(N, K) at most."""
    for name, layer in layers.items():
        short, long = sorted(sides(layer))
        if short < rank and long < GATE * short:
            last = name.rpartition(".")[2]
            raise ConfigError("adapter.rank", f"must be at most {short}, the smaller side of {last}", got=rank, fix="Lower it.")


LORA = Method(config=lora, describes=describes, check=rank_fits)

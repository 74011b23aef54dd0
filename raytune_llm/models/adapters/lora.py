"""LoRA, low-rank adapters: W + scale * B A (Hu et al. 2021, arXiv 2106.09685).

Options: rsLoRA, scale = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732); LoRA+, a higher learning rate for B (Hayou et
al. 2024, arXiv 2402.12354); and DoRA (dora.py), with any initialization of A and B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

from raytune_llm.config.adapter import Layered, LowRank
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import Layers, Method, sides

GATE_OUTPUTS, GATE_RATIO = 64, 16
"""A linear layer with at most this many outputs, and at least this many inputs per output, is a gate. With all-linear, gates get
adapters too; adapter.rank may be above their number of outputs."""


def lora(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    rslora: bool,
    dora: bool,
    lr_ratio: float,
    embedding_lr_ratio: float,
) -> LoraConfig:
    variant: Any = {"use_rslora": rslora, "use_dora": dora}
    patterns: Any = {"rank_pattern": dict(rank_pattern), "alpha_pattern": dict(alpha_pattern)}
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **patterns, **variant)  # type: ignore[arg-type]  # whole or not


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, LoraConfig)


def continues(saved: PeftConfig, section: Layered) -> None:
    """Take the section's dropout. Raise ConfigError if its rslora, dora or experts differ from the saved adapter's."""
    assert isinstance(saved, LoraConfig) and isinstance(section, LowRank)
    saved.lora_dropout = section.dropout
    for setting, there, here in (
        ("dora", saved.use_dora, section.dora),
        ("rslora", saved.use_rslora, section.rslora),
        ("experts", bool(saved.target_parameters), getattr(section, "experts", False)),
    ):
        if there != here:
            word = str(there).lower()
            rule = f"must be as in the adapter that is continued, {word}"
            raise ConfigError(f"adapter.{setting}", rule, got=here, fix=f"Set adapter.{setting}={word}.")


def lr_factor(name: str, section: Layered) -> float:
    assert isinstance(section, LowRank)
    if ".lora_embedding_" in name:
        return section.embedding_lr_ratio
    return section.lr_ratio if ".lora_B." in name else 1.0


def ranks_fit(
    layers: Layers,
    *,
    rank: int,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    spares_gates: bool = True,
    **settings: Any,
) -> None:
    """Raise ConfigError unless each rank is at most min(N, K) of its layer's weight [N, K], the largest rank that B A can have,
    and each pattern matches layers. spares_gates: ranks may be larger for gates, which have few outputs."""
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
    """Whether the layer computes one number for each head or expert, a gate that multiplies other values."""
    inputs, outputs = sides(layer)
    return not isinstance(layer, nn.Embedding) and outputs <= GATE_OUTPUTS and inputs >= GATE_RATIO * outputs


LORA = Method(config=lora, describes=describes, check=ranks_fit, continues=continues, lr_factor=lr_factor)

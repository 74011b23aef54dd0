"""Gives a model more positions by scaling its rotary positions with a method of transformers (model.rope_scaling).

The factor is the smallest integer that suffices, as in LLaMA-Factory.
"""

from __future__ import annotations

import copy
from math import ceil
from typing import Any

from transformers import PretrainedConfig

from raytune_llm.errors import ConfigError

OF_THE_FACTOR = ("factor", "attention_factor")
"""Entries that hold for one factor only."""
KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Entries of rope_parameters that stay when the scaling is replaced."""
BY_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Llama 3.1's parameters."""


def with_positions(config: PretrainedConfig, wanted: int, kind: str) -> PretrainedConfig:
    """The config with at least `wanted` positions. It is unchanged if it has them; otherwise an existing scaling is replaced, and
    one of this kind keeps its other parameters (YaRN's beta_fast, mscale and truncate). A linear one is multiplied.

    kind: linear (Chen et al. 2023, arXiv 2306.15595), dynamic (NTK-aware: frequencies stay until texts exceed the new positions),
    yarn (Peng et al. 2023, arXiv 2309.00071) or llama3.
    """
    text: Any = config.get_text_config()
    rope, known = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if known is not None and wanted <= known:
        return config
    if known is None or not isinstance(rope, dict) or "rope_theta" not in rope:
        rule = f"can't be more than {config.model_type} has, whose positions are not rotary ones of one frequency base"
        raise ConfigError("model.positions", rule, got=wanted, fix="Leave model.positions and model.rope_scaling out.")
    original = rope.get("original_max_position_embeddings") or known
    longer_by = ceil(wanted / original)
    factor = float(longer_by) * _stretched(rope, kind)
    beside: dict[str, Any] = {} if kind == "linear" else {"original_max_position_embeddings": original}
    same = {name: value for name, value in rope.items() if rope.get("rope_type") == kind and name not in OF_THE_FACTOR}
    if kind == "llama3":
        beside = BY_BANDS | beside
    kept = {name: rope[name] for name in KEPT if name in rope}
    scaled = {
        "rope_parameters": {**kept, **beside, **same, "rope_type": kind, "factor": factor},
        "max_position_embeddings": original * longer_by,
    }
    longer = type(text).from_dict({**text.to_dict(), **scaled})
    longer.name_or_path = text.name_or_path
    if text is config:
        return longer
    whole = copy.deepcopy(config)
    family: Any = type(config)
    name = next(name for name in family.sub_configs if getattr(config, name, None) is text)
    setattr(whole, name, longer)
    return whole


def _stretched(rope: dict[str, Any], kind: str) -> float:
    """The factor of a linear scaling that the model has already, if its config only tells the positions with it; else 1. Raises
    ConfigError if another kind is to follow such a scaling: the positions without it are not known."""
    if rope.get("rope_type") != "linear" or rope.get("original_max_position_embeddings"):
        return 1.0
    if kind != "linear":
        rule = f"must be linear for a model whose positions are scaled linearly already, by {rope['factor']:g}"
        fix = "Set linear, or all parameters of another scaling by model.config.rope_scaling."
        raise ConfigError("model.rope_scaling", rule, got=kind, fix=fix)
    return float(rope["factor"])

"""The generation config beside the weights: stop tokens and the makers' sampling settings."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import GenerationConfig

from raytune_llm.errors import ConfigError, first_line

UNREAD_WITHOUT_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Settings, with their defaults."""


def savable(generation: GenerationConfig) -> GenerationConfig:
    """Without the settings of sampling that `do_sample: false` leaves unread, which transformers loads and refuses to save."""
    if not generation.do_sample:
        for name, default in UNREAD_WITHOUT_SAMPLING.items():
            if getattr(generation, name, None) not in (None, default):
                setattr(generation, name, None)
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            "model.path", f"must be a model whose generation_config.json transformers can save ({first_line(error)})",
            fix="Correct that file.",
        ) from None  # fmt: skip
    return generation


def end_ids_of(generation: GenerationConfig) -> list[int]:
    """Its stop tokens."""
    ids = generation.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def ending_at(generation: GenerationConfig, stop_ids: Sequence[int]) -> GenerationConfig:
    """The config to save, with these stop tokens added."""
    changed = copy.deepcopy(generation)
    changed.eos_token_id = sorted({*end_ids_of(generation), *stop_ids})
    return savable(changed)

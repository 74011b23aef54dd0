"""Reads and prepares a model's generation config: stop tokens and its makers' sampling settings."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig

from raytune_llm import packaged
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
"""Sampling settings that `do_sample: false` leaves unread -> their defaults."""


def savable(generation: GenerationConfig) -> GenerationConfig:
    """The config without the sampling settings that `do_sample: false` leaves unread: transformers loads them and refuses to
    save."""
    if not generation.do_sample:
        for name, default in UNREAD_WITHOUT_SAMPLING.items():
            if getattr(generation, name, None) not in (None, default):
                setattr(generation, name, None)
    try:
        generation.validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            "model.path", f"must be a model whose generation_config.json transformers can save ({first_line(error)})",
            fix="Correct that file.",
        ) from None  # fmt: skip
    return generation


def read_generation_config(path: str | None) -> GenerationConfig:
    """The generation config of the model at `path`, or an empty one if it has none. Raises ConfigError if it can't be read."""
    if path is None:
        return GenerationConfig()
    folder = packaged.resolve(path)
    try:
        generation = GenerationConfig.from_pretrained(folder)
        if not all(isinstance(id, int) for id in end_ids_of(generation)):
            raise ValueError(f"eos_token_id is {generation.eos_token_id!r}")
        return generation
    except Exception as error:  # transformers raises many kinds of errors for a damaged file
        if isinstance(error, OSError) and not os.path.lexists(Path(folder, "generation_config.json")):
            return GenerationConfig()
        rule = f"must be a model whose generation_config.json can be read ({first_line(error)})"
        raise ConfigError("model.path", rule, got=path, fix="Correct that file, or remove it.") from None


def end_ids_of(generation: GenerationConfig) -> list[int]:
    """The config's stop tokens as a list."""
    ids = generation.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def ending_at(generation: GenerationConfig, stop_ids: Sequence[int]) -> GenerationConfig:
    """The config to save, with these stop tokens added."""
    changed = copy.deepcopy(generation)
    changed.eos_token_id = sorted({*end_ids_of(generation), *stop_ids})
    return savable(changed)

"""Vectors beside random matrices that every layer shares (Kopiczko et al. 2023, arXiv 2310.11454)."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig, VeraConfig

from raytune_llm.config.adapter import Layered
from raytune_llm.config.adapter import VeRA as VeRASection
from raytune_llm.models.adapters.method import Kept, Layers, Method, only_linear


def vera(*, rank: int, dropout: float, initial_d: float, projection_seed: int) -> VeraConfig:
    settings: dict[str, Any] = {"vera_dropout": dropout, "d_initial": initial_d, "projection_prng_key": projection_seed}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save vera_A")
        return VeraConfig(r=rank, save_projection=False, **settings)


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, VeraConfig)


def check(layers: Layers, **settings: Any) -> None:
    only_linear(layers, "vera")


def continues(saved: PeftConfig, section: Layered) -> None:
    """Take the section's dropout."""
    assert isinstance(saved, VeraConfig) and isinstance(section, VeRASection)
    saved.vera_dropout = section.dropout


KEPT = Kept(alone=True, inputs=False, outputs=1)
"""What A and B did, before the last vector. No input, since A is not trained."""
VERA = Method(config=vera, describes=describes, check=check, continues=continues, kept=KEPT)

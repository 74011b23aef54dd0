from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import PositiveInt, section


@section
class NoAdapter:
    """Full fine-tuning."""

    name: Literal["none"]


@section
class LoRA:
    """Hu et al. 2021: W + alpha / rank * B A, with A and B trained."""

    name: Literal["lora"]
    rank: PositiveInt
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: Literal["all-linear"] | list[str]
    """Names of the linear layers, by their last part; all-linear takes every one but the head."""
    last_layers: PositiveInt | None
    """At most so many of the model's layers, the last ones, get an adapter, and the backward pass ends there; null: all."""
    path: str | None
    """A saved adapter to go on from; rank, alpha, targets and layers are then the saved ones."""


AdapterConfig = Annotated[NoAdapter | LoRA, Field(discriminator="name")]

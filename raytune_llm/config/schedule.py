"""Learning-rate schedules. Every one warms up linearly from 0 over warmup_ratio of all steps (rounded up)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, section


@section
class Constant:
    name: Literal["constant"]
    warmup_ratio: Fraction


@section
class Linear:
    name: Literal["linear"]
    warmup_ratio: Fraction


@section
class Cosine:
    name: Literal["cosine"]
    warmup_ratio: Fraction
    floor: Fraction
    """The part of the peak rate at which the descent ends."""


@section
class WarmupStableDecay:
    name: Literal["wsd"]
    warmup_ratio: Fraction
    decay_ratio: Fraction | None
    """Part of all steps in the final descent; none leaves a third of the steps after warm-up stable and lets the rest decay."""
    floor: Fraction


@section
class InverseSqrt:
    name: Literal["inverse_sqrt"]
    warmup_ratio: Fraction
    timescale: PositiveInt | None
    """Steps after which the rate has fallen by sqrt(2); none takes the warm-up's length."""


@section
class Polynomial:
    name: Literal["polynomial"]
    warmup_ratio: Fraction
    power: PositiveFloat
    lr_end: NonNegativeFloat


ScheduleConfig = Annotated[Constant | Linear | Cosine | WarmupStableDecay | InverseSqrt | Polynomial, Field(discriminator="name")]

"""Learning-rate schedules. Every one warms up linearly from 0: over a part of all steps (rounded up) or a number of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError


@section
class Warmup:
    """What all schedules begin with."""

    warmup_ratio: Fraction | None
    warmup_steps: NonNegativeInt | None
    """One of the two."""

    def __post_init__(self) -> None:
        if (self.warmup_ratio is None) == (self.warmup_steps is None):
            raise ConfigError(
                "schedule.warmup_steps",
                "must be given if schedule.warmup_ratio is null, and only there",
                got="null" if self.warmup_steps is None else self.warmup_steps,
                fix="Set one of the two, and the other to null.",
            )


@section
class Constant(Warmup):
    name: Literal["constant"]


@section
class Linear(Warmup):
    name: Literal["linear"]


@section
class Cosine(Warmup):
    name: Literal["cosine"]
    floor: Fraction
    """The part of the peak rate at which the descent ends."""


@section
class WarmupStableDecay(Warmup):
    name: Literal["wsd"]
    decay_ratio: Fraction | None
    """Part of all steps in the final descent; none leaves a third of the steps after warm-up stable and lets the rest decay."""
    floor: Fraction


@section
class InverseSqrt(Warmup):
    name: Literal["inverse_sqrt"]
    timescale: PositiveInt | None
    """Steps after which the rate has fallen by sqrt(2); none takes the warm-up's length."""


@section
class Polynomial(Warmup):
    name: Literal["polynomial"]
    power: PositiveFloat
    lr_end: NonNegativeFloat


ScheduleConfig = Annotated[Constant | Linear | Cosine | WarmupStableDecay | InverseSqrt | Polynomial, Field(discriminator="name")]

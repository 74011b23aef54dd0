"""Learning-rate schedules. Each warms up linearly from 0, over a fraction of all steps (rounded up) or a number of steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError


@section
class Warmup:
    """Settings of all schedules: the warm-up."""

    warmup_ratio: Fraction | None
    warmup_steps: NonNegativeInt | None
    """Exactly one of the two is given."""

    follows_total: ClassVar[bool] = True
    """The learning rate after the warm-up depends on the total number of steps."""

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

    follows_total: ClassVar[bool] = False


@section
class Linear(Warmup):
    name: Literal["linear"]


@section
class Cosine(Warmup):
    name: Literal["cosine"]
    floor: Fraction
    """The final learning rate as a fraction of the peak."""


@section
class WarmupStableDecay(Warmup):
    name: Literal["wsd"]
    decay_ratio: Fraction | None
    """Fraction of all steps in the final decay. null: of the steps after the warm-up, the first third is constant and the rest
    decays."""
    floor: Fraction


@section
class InverseSqrt(Warmup):
    name: Literal["inverse_sqrt"]
    timescale: PositiveInt | None
    """Steps after which the learning rate has fallen by a factor of sqrt(2); null: the length of the warm-up."""

    follows_total: ClassVar[bool] = False


@section
class Polynomial(Warmup):
    name: Literal["polynomial"]
    power: PositiveFloat
    lr_end: NonNegativeFloat


ScheduleConfig = Annotated[Constant | Linear | Cosine | WarmupStableDecay | InverseSqrt | Polynomial, Field(discriminator="name")]

"""Declares a section of the config: a frozen, keyword-only dataclass that checks types strictly and refuses unknown keys.

Sections hold types and rules but no default values; those are in `conf/`, each in one place.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

T = TypeVar("T")

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""As torch's generators take it."""
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    # A validator is built when it is first used: help needs none, and no command needs those of all verbs.
    rules = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
    return dataclass(frozen=True, kw_only=True, config=rules)(cls)  # type: ignore[return-value]


@cache
def validator_of(kind: type[T]) -> TypeAdapter[T]:
    """The pydantic validator of a section or a run. It is built at its first use and cached, since building takes 20 ms."""
    return TypeAdapter(kind)


def settings_of(section: Any) -> dict[str, Any]:
    """The settings of a section without its `name`, as keyword arguments for the function that the name selects."""
    return {field.name: getattr(section, field.name) for field in fields(section) if field.name != "name"}

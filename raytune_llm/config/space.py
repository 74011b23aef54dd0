"""The space of a sweep: settings with the values that they may take, and how points are drawn from it or enumerated."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from raytune_llm.errors import ConfigError

DIGITS = 3
"""Significant digits of a drawn number, so that values are readable and can be typed again exactly."""

MOST = 1000
"""Maximum values of a list and points of a grid, since each is composed before the first trial."""
Point = Mapping[str, Any]
"""Setting -> value."""


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values

    def draw(self, share: float) -> Any:
        """One of the values. share: a uniform random number from 0 to 1."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def holds(self, value: Any) -> bool:
        return value in self.values


@dataclass(frozen=True)
class Interval:
    """Any number from `low` to `high`. whole: integers only. log: uniform in the logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def draw(self, share: float) -> float:
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return self.rounded(math.exp(low + share * (high - low)))
        return self.rounded(self.low + share * (self.high - self.low))

    def rounded(self, value: float) -> float:
        short = round(value) if self.whole else float(f"{value:.{DIGITS}g}")
        return min(max(short, self.low), self.high)

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


Values = Choice | Interval


@dataclass(frozen=True)
class Axis:
    """Settings that change together, one value each; usually a single one."""

    settings: tuple[str, ...]
    values: Values
    """A Choice of tuples where there are several settings."""

    def point(self, value: Any) -> dict[str, Any]:
        return {self.settings[0]: value} if len(self.settings) == 1 else dict(zip(self.settings, value, strict=True))

    def value_in(self, point: Point) -> Any:
        """This axis's value in a point: the inverse of `point`."""
        return point[self.settings[0]] if len(self.settings) == 1 else tuple(point[setting] for setting in self.settings)

    @property
    def name(self) -> str:
        return ",".join(self.settings)


def check(setting: str, values: Values) -> None:
    """Raises ConfigError for values that can't be drawn from."""
    if isinstance(values, Choice):
        if not values.values:
            raise ConfigError(setting, "has no value to try", fix="Say, 1,2,4.")
        if len({repr(value) for value in values.values}) < len(values.values):
            raise ConfigError(setting, "has a value twice", got=", ".join(map(str, values.values)), fix="Take it out.")
        check_length(setting, len(values.values), values.values[0], values.values[-1])
        return
    got = f"interval({values.low:g},{values.high:g})"
    if not (math.isfinite(values.low) and math.isfinite(values.high)):
        raise ConfigError(setting, "must have ends that are finite numbers", got=got, fix="Write them, say interval(0,0.1).")
    if not values.low < values.high:
        turned = f"Write interval({values.high:g},{values.low:g})." if values.high < values.low else "Give it as one value."
        raise ConfigError(setting, "must have the lower end of its interval first", got=got, fix=turned)
    if values.log and values.low <= 0:
        raise ConfigError(setting, "must be above 0 to be drawn by its logarithm", got=got, fix="Raise the lower end.")


def check_length(setting: str, count: int, first: Any, last: Any) -> None:
    """Raises ConfigError if there are too many values to compose each before the sweep."""
    if count > MOST:
        numbers = all(isinstance(value, int | float) for value in (first, last))
        fix = f"Write int(interval({first},{last}))." if numbers else "Take fewer."
        raise ConfigError(setting, f"must have at most {MOST:,} values", got=f"{count:,} of them", fix=fix)


def axes_of(space: Mapping[str, Values], zips: Sequence[Sequence[str]]) -> tuple[Axis, ...]:
    """The space as axes, in the given order; settings that are zipped form one axis. Raises ConfigError."""
    joined: dict[str, tuple[str, ...]] = {}
    for together in zips:
        if len(together) < 2:
            fix = "Say, [[adapter.rank,adapter.alpha]]."
            raise ConfigError("tune.zip", "must name two settings or more", got=together, fix=fix)
        for setting in together:
            if setting not in space:
                raise ConfigError(
                    "tune.zip", "must name settings of the space", got=setting, fix=f"There are: {', '.join(space)}."
                )
            if setting in joined:
                raise ConfigError("tune.zip", "has a setting twice", got=setting)
            if isinstance(space[setting], Interval):
                raise ConfigError("tune.zip", "must name settings with a list of values", got=setting)
            joined[setting] = tuple(together)
        lengths = {setting: len(space[setting].ends) for setting in together}
        if len(set(lengths.values())) > 1:
            got = ", ".join(f"{setting} has {length}" for setting, length in lengths.items())
            raise ConfigError("tune.zip", "must name settings with as many values each", got=got)
    axes: dict[tuple[str, ...], Axis] = {}
    for setting, values in space.items():
        together = joined.get(setting, (setting,))
        if together not in axes:
            several = Choice(tuple(zip(*(space[one].ends for one in together), strict=True)))
            axes[together] = Axis(together, values if len(together) == 1 else several)
    return tuple(axes.values())


def check_grid(axes: Sequence[Axis]) -> None:
    """Raises ConfigError for an interval, which can't be enumerated, and for a grid with too many points."""
    for axis in axes:
        if isinstance(axis.values, Interval):
            raise ConfigError(axis.name, "must be a list of values where tune=grid", fix="Take tune=random, or write the values.")
    number = math.prod(len(axis.values.ends) for axis in axes)
    if number > MOST:
        fix = "Take tune=random, or fewer values."
        raise ConfigError("tune", f"can be grid for up to {MOST:,} points", got=f"a grid of {number:,}", fix=fix)


def grid(axes: Sequence[Axis]) -> Iterator[Point]:
    """All combinations of values. The last axis changes fastest."""
    for values in product(*(axis.values.ends for axis in axes)):
        yield merged(axis.point(value) for axis, value in zip(axes, values, strict=True))


def drawn(axes: Sequence[Axis], seed: int, number: int) -> Point:
    """The random point with this number. It depends only on the axes, the seed and the number."""
    shares = random.Random(f"{seed}:{number}")
    return merged(axis.point(axis.values.draw(shares.random())) for axis in axes)


def firsts(axes: Sequence[Axis]) -> dict[str, Any]:
    """The point with the first value of each axis."""
    return merged(axis.point(axis.values.ends[0]) for axis in axes)


def of_run(run: Any, setting: str) -> Any:
    """The run's value of a setting; None if the run has no such setting."""
    found = run
    for name in setting.lstrip("+").split("."):
        found = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
    return found


def merged(points: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return {setting: value for point in points for setting, value in point.items()}

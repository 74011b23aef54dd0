"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846), all trials at the same steps.

All are trained to the same part of their steps and wait there. Then the worst ones take over weights, optimizer and place in the
data of some of the best, with values near theirs, and all continue. What is taken over follows from the metric, the seed and the
round alone, not from which trial was faster, so that an interrupted sweep is resumed to the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from raytune_llm.config.space import Axis, Choice, Point
from raytune_llm.config.sweep import Sweep
from raytune_llm.tune.trial import Trial

FACTORS = (0.8, 1.2)


def exploited(sweep: Sweep, waiting: Sequence[Trial], number: int) -> Iterator[tuple[Trial, Trial, Point]]:
    """(replaced trial, trial whose checkpoint it copies, its new values; the other one's where new ones don't go together).
    waiting: best first. number: of the round."""
    count = min(max(1, len(waiting) // sweep.tune.reduction), len(waiting) // 2)
    draws = random.Random(f"{sweep.tune.seed} {number}")
    for trial in waiting[len(waiting) - count :]:
        donor = draws.choice(waiting[:count])
        point = near(sweep, donor.point, draws)
        yield trial, donor, point if sweep.composes(point) else dict(donor.point)


def near(sweep: Sweep, point: Point, draws: random.Random) -> dict[str, Any]:
    """Each number of an interval is multiplied by 0.8 or 1.2, and drawn where the base has none (null); a value of a list is
    replaced by a neighbour."""
    found = dict(point)
    for axis in sweep.axes:
        found |= axis.point(_near(axis, sweep.value_of(axis, point), draws))
    return found


def _near(axis: Axis, value: Any, draws: random.Random) -> Any:
    if not isinstance(axis.values, Choice):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return axis.values.rounded(value * draws.choice(FACTORS)) if number else axis.values.draw(draws.random())
    values = axis.values.values
    at = values.index(value) + draws.choice((-1, 1)) if value in values else 0
    return values[min(max(at, 0), len(values) - 1)]

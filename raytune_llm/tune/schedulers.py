"""Schedulers end trials early. Each is called at every evaluation of a trial, and keeps what was reported before.

A trial's progress is the part of its own steps that it has made, so that trials of different lengths compare. Scores: less is
better. A scheduler's answers follow from the order of questions alone, so that an interrupted sweep is resumed by asking again.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Protocol

from raytune_llm.config.tune import TuneConfig

ROUNDING = 1e-9
"""Tolerance of rungs: step 18 of 60 is at the rung of 0.1 x 3 in spite of rounding."""


def rungs(*, grace: float, reduction: int) -> tuple[float, ...]:
    """The fractions of the steps at grace, grace * reduction and so on up to 1/reduction, since later rungs would save little. At
    least one."""
    found = [round(grace, 9)]
    while found[-1] * reduction**2 <= 1 + ROUNDING:
        found.append(round(found[-1] * reduction, 9))
    return tuple(found)


class Scheduler(Protocol):
    def rungs(self, trial: int) -> tuple[float, ...] | None:
        """The fractions of its steps after which a trial is judged; None: at each evaluation."""
        ...

    def goes_on(self, trial: int, progress: float, score: float) -> bool: ...


class Never:
    """Ends no trial early."""

    def rungs(self, trial: int) -> None:
        return None

    def goes_on(self, trial: int, progress: float, score: float) -> bool:
        return True


class Asha:
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934), as trials are stopped rather than promoted.

    At each rung a trial continues if it is among the best 1/reduction of those that came so far; the first one always does.
    """

    def __init__(self, *, grace: float, reduction: int) -> None:
        self._reduction = reduction
        parts = rungs(grace=grace, reduction=reduction)
        self._rungs: list[tuple[float, dict[int, float]]] = [(part, {}) for part in reversed(parts)]
        """(progress, trial -> score) of each rung, the last rung first."""

    def rungs(self, trial: int) -> tuple[float, ...]:
        return tuple(progress for progress, _ in reversed(self._rungs))

    def goes_on(self, trial: int, progress: float, score: float) -> bool:
        for rung, scores in self._rungs:
            if progress < rung - ROUNDING or trial in scores:
                continue
            better = sum(other < score for other in scores.values())
            scores[trial] = score
            return better < max(1, len(scores) // self._reduction)
        return True


class Hyperband:
    """Asynchronous HyperBand (ibid.): brackets of successive halving, each with a later first rung than the one before. Trials
    are assigned to brackets in turn, so that some are not judged by their first steps alone."""

    def __init__(self, *, grace: float, reduction: int) -> None:
        count = 1 + math.floor(-math.log(grace, reduction))
        self._brackets = [Asha(grace=grace * reduction**number, reduction=reduction) for number in range(count)]

    def rungs(self, trial: int) -> tuple[float, ...]:
        return self._bracket(trial).rungs(trial)

    def goes_on(self, trial: int, progress: float, score: float) -> bool:
        return self._bracket(trial).goes_on(trial, progress, score)

    def _bracket(self, trial: int) -> Asha:
        return self._brackets[trial % len(self._brackets)]


class Median:
    """The median stopping rule (Golovin et al. 2017, Google Vizier): a trial ends if its best value is worse than the median of
    the other trials' means up to the same progress."""

    LEAST = 3
    """Minimum number of other trials."""

    def __init__(self, *, grace: float) -> None:
        self._grace = grace
        self._scores: dict[int, list[tuple[float, float]]] = {}

    def rungs(self, trial: int) -> None:
        return None

    def goes_on(self, trial: int, progress: float, score: float) -> bool:
        own = self._scores.setdefault(trial, [])
        own.append((progress, score))
        if progress < self._grace - ROUNDING:
            return True
        others = [
            _mean([score for at, score in scores if at <= progress])
            for number, scores in self._scores.items()
            if number != trial and scores[-1][0] >= progress
        ]
        return len(others) < self.LEAST or min(score for _, score in own) <= median(others)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.inf


SCHEDULERS = {
    "none": lambda tune: Never(),
    "asha": lambda tune: Never() if tune.promotes else Asha(grace=tune.grace, reduction=tune.reduction),
    "hyperband": lambda tune: Hyperband(grace=tune.grace, reduction=tune.reduction),
    "median": lambda tune: Median(grace=tune.grace),
    "pbt": lambda tune: Never(),
}


def scheduler_of(tune: TuneConfig) -> Scheduler:
    return SCHEDULERS[tune.scheduler](tune)

"""Successive halving by promotion: all trials come to the first rung and wait there; the best part of them resumes to the next.

This is ASHA as it was published (Li et al. 2020, arXiv 1810.05934, algorithm 2), but for one thing: a trial is promoted once none
that is still to come can take its place, not as soon as it is among the best so far. So what is promoted depends neither on the
order of trials nor on their speed, and no steps are spent on one that was ahead only because it came early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raytune_llm.config.sweep import Sweep
from raytune_llm.tune.schedulers import rungs
from raytune_llm.tune.trial import Trial


class Halving:
    """trials: how many there are to be. Rungs are numbered from 0; a trial's `round` is the rung that it comes to next."""

    def __init__(self, rungs: Sequence[float], *, reduction: int, trials: int) -> None:
        self.rungs = tuple(rungs)
        self._reduction, self._trials = reduction, trials
        self._scores: list[dict[int, float]] = [{} for _ in rungs]
        """One dict per rung: trial -> score."""

    def rung_of(self, trial: Trial) -> float | None:
        """The fraction of its steps at which the trial waits next; None: it trains to its end."""
        return self.rungs[trial.round] if trial.round < len(self.rungs) else None

    @property
    def work(self) -> float:
        """The steps of the whole sweep, as a number of full trials."""
        work, left, at = 0.0, self._trials, 0.0
        for rung, part in enumerate(self.rungs):
            work, left, at = work + left * (part - at), self._room(rung), part
        return work + left * (1 - at)

    @property
    def waiting(self) -> int:
        """The number of trials that wait at the first rung at the same time: those to promote, one in reserve, and the latest
        one."""
        return min(self._trials, self._room(0) + 2)

    def came(self, trial: Trial, score: float) -> None:
        """Record that the trial waits at its rung."""
        self._scores[trial.round][trial.number] = score

    def promoted(self, trials: Sequence[Trial]) -> Trial | None:
        """The next trial to promote: the best promotable one of the lowest rung; None if there is none."""
        ready = [trial for trial in _waiting(trials) if self._is_sure(trial, trials)]
        return min(ready, key=lambda trial: (trial.round, self._place(trial, trials)), default=None)

    def _is_sure(self, trial: Trial, trials: Sequence[Trial]) -> bool:
        return self._place(trial, trials) + self._coming(trial.round, trials) <= self._room(trial.round)

    def lost(self, trials: Sequence[Trial]) -> list[Trial]:
        """Waiting trials that will not be promoted. Each rung keeps one in reserve, in case a promoted one fails."""
        over = all(trial.state != "running" for trial in trials) and len(trials) >= self._trials and self.promoted(trials) is None
        return [trial for trial in _waiting(trials) if over or self._place(trial, trials) > 1 + self._room(trial.round)]

    def _room(self, rung: int) -> int:
        """The number of trials of a rung that are promoted, at least one."""
        left = self._trials
        for _ in range(rung + 1):
            left = max(1, left // self._reduction)
        return left

    def _place(self, trial: Trial, trials: Sequence[Trial]) -> int:
        """The trial's rank at its rung, from 1, among those that have not failed."""
        scores = self._scores[trial.round]
        own = (scores[trial.number], trial.number)
        return 1 + sum((score, number) < own for number, score in scores.items() if trials[number].state != "failed")

    def _coming(self, rung: int, trials: Sequence[Trial]) -> int:
        """The largest number of trials that may still reach a rung."""
        there = self._scores[rung]
        on_the_way = sum(trial.state in ("running", "paused") and trial.number not in there for trial in trials)
        coming = on_the_way + max(0, self._trials - len(trials))
        if not rung:
            return coming
        return min(coming, max(0, self._room(rung - 1) - sum(trials[number].state != "failed" for number in there)))


def _waiting(trials: Sequence[Trial]) -> Iterator[Trial]:
    return (trial for trial in trials if trial.state == "paused")


def halving_of(sweep: Sweep) -> Halving | None:
    """The promotion of trials; None if the scheduler has none."""
    tune = sweep.tune
    if not tune.promotes:
        return None
    return Halving(rungs(grace=tune.grace, reduction=tune.reduction), reduction=tune.reduction, trials=len(sweep.planned))

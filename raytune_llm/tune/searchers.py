"""Searchers choose the next point: the planned ones in order, or those of a sampler that learns from trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from raytune_llm.config.space import Axis, Choice, Point
from raytune_llm.config.sweep import Sweep
from raytune_llm.errors import ResourceError

STARTUP = 5
"""Random points before TPE uses results."""


class Searcher(Protocol):
    def ask(self) -> Point | None:
        """The next point. None: the search has ended."""
        ...

    def tell(self, number: int, reports: Sequence[tuple[int, float]], scores: Sequence[float] | None, *, whole: bool) -> None:
        """Record the result of point `number` (from 0), once it is final: (step, score) of its evaluations, and the last score of
        each metric; None: it failed. whole: the trial ran to its end."""
        ...


class Planned:
    """Points that are known in advance: a grid, or random ones."""

    def __init__(self, sweep: Sweep) -> None:
        self._points = iter(sweep.planned)

    def ask(self) -> Point | None:
        return next(self._points, None)

    def tell(self, number: int, reports: Sequence[tuple[int, float]], scores: Sequence[float] | None, *, whole: bool) -> None:
        pass


class Optuna:
    """Optuna's TPE sampler, after the planned points. It learns from these, too, if they are in the space. Of several metrics it
    looks for the Pareto front (Ozaki et al. 2022, JAIR 73)."""

    def __init__(self, sweep: Sweep) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ResourceError("tune=optuna needs the package optuna", "pip install 'raytune-llm[tune]'") from error
        self._optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._axes = sweep, sweep.axes
        self._first = list(sweep.planned)
        sampler = optuna.samplers.TPESampler(seed=sweep.tune.seed, constant_liar=True, n_startup_trials=STARTUP)
        less: Any = ["minimize"] * len(sweep.tune.metrics)
        self._study = optuna.create_study(directions=less, sampler=sampler)
        self._distributions = {axis.name: self._distribution(axis) for axis in sweep.axes}
        self._asked: list[Any] = []
        """Optuna's trials, or the parameters of planned points. None: a point is outside the space."""

    def ask(self) -> Point:
        if self._first:
            point = self._first.pop(0)
            self._asked.append(self._parameters(point))
            return point
        trial = self._study.ask(self._distributions)
        self._asked.append(trial)
        return {name: value for axis in self._axes for name, value in axis.point(self._value(axis, trial)).items()}

    def tell(self, number: int, reports: Sequence[tuple[int, float]], scores: Sequence[float] | None, *, whole: bool) -> None:
        asked, states = self._asked[number], self._optuna.trial.TrialState
        state = states.FAIL if scores is None else states.COMPLETE if whole else states.PRUNED
        if isinstance(asked, self._optuna.trial.Trial):
            for step, value in reports if len(self._study.directions) == 1 else ():
                asked.report(value, step)
            self._study.tell(asked, scores if state == states.COMPLETE else None, state=state)
        elif asked is not None and state == states.COMPLETE:
            done = self._optuna.trial.create_trial(params=asked, distributions=self._distributions, values=scores)
            self._study.add_trial(done)

    def _distribution(self, axis: Axis) -> Any:
        kinds, values = self._optuna.distributions, axis.values
        if isinstance(values, Choice):
            return kinds.CategoricalDistribution(list(range(len(values.values))))  # values may be lists, which Optuna can't hold
        kind = kinds.IntDistribution if values.whole else kinds.FloatDistribution
        return kind(values.low, values.high, log=values.log)

    def _value(self, axis: Axis, trial: Any) -> Any:
        drawn = trial.params[axis.name]
        return axis.values.values[drawn] if isinstance(axis.values, Choice) else axis.values.rounded(drawn)

    def _parameters(self, point: Point) -> dict[str, Any] | None:
        """The point as Optuna's parameters. None: a value is outside the space."""
        found: dict[str, Any] = {}
        for axis in self._axes:
            value = self._sweep.value_of(axis, point)
            if not axis.values.holds(value):
                return None
            found[axis.name] = axis.values.values.index(value) if isinstance(axis.values, Choice) else value
        return found


def searcher_of(sweep: Sweep) -> Searcher:
    return SEARCHERS[sweep.tune.name](sweep)


SEARCHERS: dict[str, Callable[[Sweep], Searcher]] = {"grid": Planned, "random": Planned, "optuna": Optuna}

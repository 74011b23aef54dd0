"""The metric that trials are compared by: a value of each evaluation, or one of the finished run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from raytune_llm.config.tune import EVALUATIONS, EXACT_MATCH, TuneConfig, known_at_end
from raytune_llm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Metric:
    name: str
    sign: int
    """1 if lower is better, -1 if higher is."""
    at_end: Callable[[Any], float | None] | None
    """The metric of a finished run's TrainResult. None: evaluations have it."""
    others: tuple[Metric, ...] = ()
    """The sweep's other metrics."""

    @property
    def all(self) -> tuple[Metric, ...]:
        return self, *self.others

    @property
    def mode(self) -> str:
        return "min" if self.sign == 1 else "max"

    def score(self, value: float) -> float:
        """The value as a score, of which lower is better. NaN is the worst."""
        return math.inf if math.isnan(value) else self.sign * value

    def of_record(self, record: Mapping[str, Any]) -> float | None:
        """The metric in a record. None: it is not an evaluation, or only a finished run has the metric. Raises ConfigError for an
        evaluation without the metric."""
        if self.at_end is not None or "eval_loss" not in record:
            return None
        if self.name not in record:
            there = ", ".join(name for name in record if name.startswith(EVALUATIONS))
            raise MetricMissing(
                "tune.metric", "must be a metric that evaluations report", got=self.name, fix=f"There are: {there}."
            )
        return float(record[self.name])

    def of_trial(self, records: Sequence[Mapping[str, Any]], result: Any, *, best: bool) -> float:
        """The metric of a finished trial. best: its model is the one with the lowest held-out loss, not the last one."""
        if self.at_end is not None:
            return self._computed(self.at_end, result)
        evaluations = [record for record in records if self.of_record(record) is not None and record["step"] > 0]
        if not evaluations:
            raise MetricMissing("tune.metric", "is reported by no evaluation: there was none", got=self.name)
        kept = min(evaluations, key=lambda record: float(record["eval_loss"])) if best else evaluations[-1]
        return float(kept[self.name])

    def _computed(self, at_end: Callable[[Any], float | None], result: Any) -> float:
        """Call the metric's function, which may raise anything if it is the user's."""
        try:
            value = at_end(result)
            if value is not None:
                return float(value)
        except Exception as error:
            raise MetricMissing("tune.metric", f"must return a number ({error!r})", got=self.name) from error
        raise MetricMissing("tune.metric", "must be a number of each trial; of this one it is None", got=self.name)


class MetricMissing(ConfigError):
    """A trial has no metric. If no other trial has it either, the sweep ends."""


def metric_of(tune: TuneConfig) -> Metric:
    """The first one, with the others. Raises ConfigError if a function does not exist."""
    first, *others = (_metric(name, better) for name, better in tune.objectives.items())
    return replace(first, others=tuple(others))


def _metric(name: str, better: str | None) -> Metric:
    at_end = None
    if name == EXACT_MATCH:
        at_end = lambda result: result.summary.exact_match_after  # noqa: E731
    elif known_at_end(name):
        at_end = _function(name)
    return Metric(name=name, sign=-1 if better == "max" else 1, at_end=at_end)


def _function(name: str) -> Callable[[Any], float]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "The module must be importable: set PYTHONPATH to its folder."
        raise ConfigError("tune.metric", f"must be module:function ({error})", got=name, fix=fix) from None

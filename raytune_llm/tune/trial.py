"""One trial: a run that the scheduler may end at any evaluation."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_llm.config.run import TrainRun
from raytune_llm.errors import UserError
from raytune_llm.report.metrics import METRICS, read_metrics
from raytune_llm.report.updates import EndOfRun, RunStarted
from raytune_llm.tune.metric import Metric, MetricMissing
from raytune_llm.tune.study import State

Train = Callable[..., Any]
"""api.train."""
Reported = Callable[[int, int, float], bool]
"""(step, total steps, metric) -> whether the trial is to continue."""


FAILURES = (UserError, OSError, RuntimeError, ArithmeticError, MemoryError)
"""Errors that end only the trial, not the sweep."""


class Stopped(EndOfRun):
    """The scheduler ended the trial. It is raised in the training loop, so that memory is freed on the way out."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    state: State
    value: float | None
    others: tuple[float, ...] = ()
    """The values of further metrics, of a finished trial."""
    reason: str | None = None


def run_trial(run: TrainRun, metric: Metric, reported: Reported, train: Train) -> Outcome:
    """Train the trial, or resume it from its output folder. An error ends this trial only, and is in the outcome; but raises
    MetricMissing, which every trial would."""
    listener = Listener(run, metric, reported)
    try:
        result = train(run, sinks=[listener.record], on_update=listener.update)
        return outcome_of(run, metric, result, listener.latest)
    except Stopped:
        return Outcome(state="stopped", value=listener.latest)
    except MetricMissing:
        raise
    except FAILURES as error:
        return Outcome(state="failed", value=None, reason=reason_of(error))
    finally:
        free()


def outcome_of(run: TrainRun, metric: Metric, result: Any, latest: float | None) -> Outcome:
    """The Outcome for a TrainResult. latest: the metric of its last evaluation."""
    if result.paused:
        return Outcome(state="paused", value=latest)
    records, best = records_of(run), run.checkpoint.final == "best"
    values = {one.name: one.of_trial(records, result, best=best) for one in metric.all}
    for name, found in values.items():
        if not math.isfinite(found):
            return Outcome(state="failed", value=None, reason=f"its {name} is {found}, which is no number to compare")
    value, *others = values.values()
    return Outcome(state="finished", value=value, others=tuple(others))


class Listener:
    """Reports the metric in a run's records."""

    def __init__(self, run: TrainRun, metric: Metric, reported: Reported) -> None:
        self.latest: float | None = None
        self._run, self._metric, self._reported = run, metric, reported
        self._total: int | None = None

    def update(self, update: Any) -> None:
        """At the start of a resumed run, report its earlier records, which it does not log again."""
        if not isinstance(update, RunStarted):
            return
        self._total = update.total_steps
        for record in records_of(self._run) if update.first_step else ():
            self.record(record)

    def record(self, record: Mapping[str, Any]) -> None:
        value, *_ = [metric.of_record(record) for metric in self._metric.all]
        if value is None or record["step"] == 0:
            return
        assert self._total is not None
        self.latest = value
        if not self._reported(record["step"], self._total, value) and record["step"] < self._total:
            raise Stopped


def records_of(run: TrainRun) -> list[dict[str, Any]]:
    path = Path(run.output_dir) / METRICS
    return read_metrics(path) if path.exists() else []


def reason_of(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def free() -> None:
    """Free the memory of the trial's model now. Its modules form reference cycles, which Python frees only some time later."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""One trial: what a sweep knows of it, and its run, which the scheduler may end at any evaluation."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raytune_llm.config.run import TrainRun
from raytune_llm.config.space import Point
from raytune_llm.errors import ConfigError, ResourceError, UserError
from raytune_llm.report.metrics import METRICS, history, read_metrics
from raytune_llm.report.updates import EndOfRun, RunStarted
from raytune_llm.tune.metric import Metric, MetricMissing

State = Literal["running", "paused", "finished", "stopped", "failed"]
Train = Callable[..., Any]
"""api.train."""
Reported = Callable[[int, int, float], bool]
"""(step, total steps, metric) -> whether the trial is to continue."""


FAILURES = (UserError, OSError, RuntimeError, ArithmeticError, MemoryError)
"""Errors that end only the trial, not the sweep."""


@dataclass(kw_only=True)
class Trial:
    """One run of one point."""

    number: int
    point: Point
    seed: int
    folder: Path
    state: State = "running"
    reports: dict[int, float] = field(default_factory=dict)
    """The metric by step, as evaluations said it."""
    total_steps: int | None = None
    value: float | None = None
    """The metric of its model, or the last one where it was stopped."""
    others: tuple[float, ...] = ()
    """Further metrics of its model, where it is finished."""
    reason: str | None = None
    """Why it failed."""
    again: bool = False
    """It failed for the machine's sake: the same command tries it again, from its last checkpoint."""
    seconds: float = 0.0
    """Run time, without that of a process that was interrupted."""
    stopping: bool = False
    """The scheduler has ended it."""
    asked: int | None = None
    """Its point is the searcher's n-th; none of a clone's."""
    released: bool = False
    """It doesn't pause (any more)."""
    round: int = 0
    """The round of tune.scheduler=pbt that it is in, or the number of the rung of asha's that it comes to next."""

    @property
    def over(self) -> bool:
        """It ended, and will not be tried again."""
        return self.state not in ("running", "paused") and not self.again

    @property
    def step(self) -> int:
        return max(self.reports, default=0)

    @property
    def latest(self) -> float | None:
        return self.value if self.value is not None or not self.reports else self.reports[self.step]


class Stopped(EndOfRun):
    """The scheduler ended the trial. It is raised in the training loop, so that memory is freed on the way out."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    state: State
    value: float | None
    others: tuple[float, ...] = ()
    """The values of further metrics, of a finished trial."""
    reason: str | None = None
    again: bool = False
    """Failed for the machine's sake, so that the same command tries it again."""
    missing: ConfigError | None = None
    """The error of a trial that failed since it has no metric. It ends the sweep where no other trial has one."""


def run_trial(run: TrainRun, metric: Metric, reported: Reported, train: Train) -> Outcome:
    """Train the trial, or resume it from its output folder. An error ends this trial only, and is in the outcome."""
    listener = Listener(run, metric, reported)
    try:
        result = train(run, sinks=[listener.record], on_update=listener.update)
        return outcome_of(run, metric, result, listener.latest)
    except Stopped:
        return Outcome(state="stopped", value=listener.latest)
    except FAILURES as error:
        return failed(error)
    finally:
        free()


def outcome_of(run: TrainRun, metric: Metric, result: Any, latest: float | None) -> Outcome:
    """The Outcome for a TrainResult. latest: the metric of its last evaluation."""
    if result.paused:
        return Outcome(state="paused", value=latest)
    records, best = history(Path(run.output_dir)), run.checkpoint.keeps_best
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


def failed(error: BaseException) -> Outcome:
    again = isinstance(error, ResourceError | OSError | MemoryError)
    missing = error.with_traceback(None) if isinstance(error, MetricMissing) else None  # its frames hold the model
    return Outcome(state="failed", value=None, reason=reason_of(error), again=again, missing=missing)


def reason_of(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def libraries_set_aside() -> Iterator[None]:
    set_libraries_aside()
    try:
        yield
    finally:
        gc.unfreeze()


def set_libraries_aside() -> None:
    """Exclude the objects that exist now from garbage collection, since libraries have far more of them than a trial. Call it
    before the first model is built: excluded objects are never freed."""
    from raytune_llm.runs import worker  # noqa: F401  what trials compute with

    gc.collect()
    gc.freeze()


def free() -> None:
    """Free the memory of the trial's model now. Its modules form reference cycles, which Python frees only some time later."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""A sweep from its first trial to its results: what is checked and prepared before, trials one after another, what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.config.resources import Inline
from raytune_llm.config.run import TrainRun
from raytune_llm.config.space import ends
from raytune_llm.config.sweep import Sweep
from raytune_llm.data import pipeline
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.runs import preflight
from raytune_llm.runs.output import full_disk_explained
from raytune_llm.runs.owner import check_writable, owned
from raytune_llm.runs.workspace import Workspace
from raytune_llm.tune.metric import metric_of
from raytune_llm.tune.results import prune, write_plots, write_results
from raytune_llm.tune.study import Setting, Study, Trial
from raytune_llm.tune.trial import Train, run_trial

OnChange = Callable[[Study, Trial], None]


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    best: Setting
    """The best one that ran to its end."""
    study: Study

    @property
    def folder(self) -> Path:
        """Of the best setting's first trial."""
        return self.best.trials[0].folder


def run_sweep(sweep: Sweep, train: Train, on_change: OnChange = lambda study, trial: None) -> TuneResult:
    """Run what is left of the sweep. on_change is called when a trial begins, reports or ends.

    Raises ConfigError and DataError for what can be known to fail before the first trial, and ResourceError where no trial
    came to its end.
    """
    check_runnable(sweep)
    metric = metric_of(sweep.tune)
    check_writable(sweep.folder)
    with owned(sweep.folder), full_disk_explained(sweep.folder):
        study = Study(sweep, metric)
        try:
            workspace = Workspace(keeps_base=True)
            _prepare(sweep, workspace)
            _run(study, partial(train, workspace=workspace), on_change)
        finally:
            study.close()
            write_results(study)
            write_plots(study)
        if not study.ranked:
            reasons = [trial.reason for trial in study.trials if trial.reason]
            raise ResourceError(f"no trial came to its end: {reasons[0] if reasons else 'all were stopped'}", "See trials.csv.")
        return TuneResult(best=study.ranked[0], study=study)


def check_runnable(sweep: Sweep) -> None:
    if not isinstance(sweep.run.resources, Inline):
        raise ConfigError(
            "resources",
            "must be inline to sweep: trials run one after another in this process",
            got=sweep.run.resources.name,
            instead="resources=inline",
        )


def _run(study: Study, train: Train, on_change: OnChange) -> None:
    failures = 0
    while (trial := study.next()) is not None:
        on_change(study, trial)
        began = time.monotonic()

        def reported(step: int, total_steps: int, value: float, trial: Trial = trial, began: float = began) -> bool:
            goes_on = study.report(trial, step, total_steps, value)
            trial.seconds = time.monotonic() - began
            on_change(study, trial)
            return goes_on

        outcome = run_trial(study.run_of(trial), study.metric, reported, train)
        trial.seconds = time.monotonic() - began
        study.end(trial, outcome.state, outcome.value, outcome.reason)
        on_change(study, trial)
        prune(study)
        write_results(study)
        failures = failures + 1 if outcome.state == "failed" else 0
        if failures == study.sweep.tune.max_failures:
            raise ResourceError(
                f"{failures} trials failed one after another, the last one since {trial.reason}",
                "Correct it, or raise tune.max_failures; the same command resumes the sweep.",
            )


def _prepare(sweep: Sweep, workspace: Workspace) -> None:
    """What can be known to fail of any value, and the token stores, once for all trials that share them."""
    runs = [with_absolute_paths(run) for run in _distinct(sweep)]
    for run in runs:
        preflight.check(run, workspace)
    for run in runs:
        if not run.data.streaming:
            make = partial(pipeline.prepare, run.model, run.data, run.resources, kind=run.stage.kind)
            workspace.once("stores", (run.model, run.data, run.stage.kind), make)


def _distinct(sweep: Sweep) -> Iterator[TrainRun]:
    """The base, and a run for each value that changes more than how it is optimized."""
    seen: set[str] = set()
    for point in ({}, *ends(sweep.axes)):
        run = sweep.composed(point)
        key = repr((run.model, run.data, run.stage, run.adapter, run.quantization, run.strategy))
        if key not in seen:
            seen.add(key)
            yield replace(run, output_dir=str(sweep.folder))

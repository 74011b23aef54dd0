"""A sweep from its first trial to its results: what is checked and prepared before, its trials, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from raytune_llm import session
from raytune_llm.atomic_file import write_atomically
from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.config.resources import Inline
from raytune_llm.config.run import TrainRun
from raytune_llm.config.space import ends
from raytune_llm.config.sweep import COMMAND, Chosen, Sweep, command_of
from raytune_llm.data import pipeline
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.runs import preflight
from raytune_llm.runs.output import adopt, full_disk_explained
from raytune_llm.runs.owner import check_writable, owned
from raytune_llm.runs.workspace import Workspace
from raytune_llm.tune.conduct import Conduct, OnChange
from raytune_llm.tune.metric import metric_of
from raytune_llm.tune.places import run_at, workers_of
from raytune_llm.tune.results import write_plots, write_results
from raytune_llm.tune.shared import TrainTogether, run_banks, trials_together
from raytune_llm.tune.study import Setting, Study
from raytune_llm.tune.trial import Train, run_trial


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    best: Setting
    """The best one that ran to its end, or where none did, that is paused."""
    study: Study

    @property
    def paused(self) -> bool:
        """Trials wait for `tune resume`."""
        return bool(self.study.paused)

    @property
    def folder(self) -> Path:
        """Of the best setting's first trial."""
        return self.best.trials[0].folder


def run_sweep(
    sweep: Sweep,
    train: Train,
    on_change: OnChange = lambda study, trial: None,
    *,
    train_together: TrainTogether | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Run what is left of the sweep. on_change is called when a trial begins, reports or ends. train_together: for trials that
    may share a base; told gets a line where they do.

    Raises ConfigError and DataError for what can be known to fail before the first trial, and ResourceError where no trial
    came to its end.
    """
    metric = metric_of(sweep.tune)
    check_writable(sweep.folder)
    with owned(sweep.folder), full_disk_explained(sweep.folder):
        study = Study(sweep, metric, adopt)
        write_atomically(sweep.folder / COMMAND, command_of(sweep))
        conduct = Conduct(study, on_change)
        try:
            if sweep.chosen is not None:
                choose(study, sweep.chosen)
            if isinstance(sweep.run.resources, Inline):
                _run_here(conduct, train, train_together, told)
            else:
                _run_on_ray(conduct, train)
        finally:
            study.close()
            write_results(study)
            write_plots(study)
        if study.paused and not study.ranked:
            first = study.paused[0]
            return TuneResult(best=Setting(point=first.point, trials=(first,)), study=study)
        if not study.ranked:
            reasons = [trial.reason for trial in study.trials if trial.reason]
            raise ResourceError(f"no trial came to its end: {reasons[0] if reasons else 'all were stopped'}", "See trials.csv.")
        return TuneResult(best=study.ranked[0], study=study)


def choose(study: Study, chosen: Chosen) -> None:
    """Which of the trials that wait go on. Raises ConfigError where there are none, or no such trial. Done already, before an
    interruption, it is not done again."""
    if not study.paused:
        if study.interrupted:
            return
        raise ConfigError("tune resume", "needs a sweep that is paused (tune.pause_at)", got=str(study.sweep.folder))
    if chosen.clone is not None:
        found = [trial for trial in study.paused if trial.number == chosen.clone]
        if not found:
            numbers = ", ".join(str(trial.number) for trial in study.paused)
            raise ConfigError("clone", "must be a trial that is paused", got=chosen.clone, fix=f"There are {numbers}.")
        point = {**found[0].point, **chosen.changes}
        if not any(trial.point == point for trial in study.interrupted):
            study.clone(found[0], chosen.changes)
    if chosen.keep is not None:
        study.release(study.paused[: chosen.keep])


def _run_here(conduct: Conduct, train: Train, train_together: TrainTogether | None, told: Callable[[str], None]) -> None:
    """In this process, one after another, or several in one pass over one base."""
    workspace, sweep = Workspace(keeps_base=True), conduct.study.sweep
    _prepare(_distinct(sweep), workspace)
    size, why = trials_together(sweep, workspace)
    if size > 1 and train_together is not None:
        told(f"{size} trials at a time, in one pass over one base ({why})")
        run_banks(conduct, size, partial(train_together, workspace=workspace))
        return
    train = partial(train, workspace=workspace)
    while (trial := conduct.next()) is not None:
        reported = partial(conduct.reported, trial)
        conduct.ended(trial, run_trial(conduct.run_of(trial), conduct.study.metric, reported, train))


def _run_on_ray(conduct: Conduct, train: Train) -> None:
    """As many at once as there are places."""
    sweep = conduct.study.sweep
    assert not isinstance(sweep.run.resources, Inline)
    grouped = workers_of(sweep.run.resources) > 1 or not sweep.base.fits_one_process
    session.connect(sweep.run.resources, dashboard=grouped)
    from raytune_llm.tune.onray import places_on_ray  # ray takes seconds to import

    runs = _distinct(sweep)
    _prepare(runs, Workspace())
    with places_on_ray(sweep, train, runs) as places:
        run_at(places, conduct)


def _prepare(runs: list[TrainRun], workspace: Workspace) -> None:
    """What can be known to fail of any value, and the token stores, once for all trials that share them."""
    for run in runs:
        preflight.check(run, workspace)
    for run in runs:
        if not run.data.streaming:
            make = partial(pipeline.prepare, run.model, run.data, run.resources, kind=run.stage.kind)
            workspace.once("stores", (run.model, run.data, run.stage.kind), make)


def _distinct(sweep: Sweep) -> list[TrainRun]:
    """The base, and a run for each value that changes more than how it is optimized."""
    return list({_needs(run): run for run in _each_end(sweep)}.values())


def _each_end(sweep: Sweep) -> Iterator[TrainRun]:
    for point in ({}, *ends(sweep.axes)):
        yield with_absolute_paths(replace(sweep.composed(point), output_dir=str(sweep.folder)))


def _needs(run: TrainRun) -> str:
    return repr((run.model, run.data, run.stage, run.adapter, run.quantization, run.strategy))

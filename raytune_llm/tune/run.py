"""Runs a sweep: the checks and preparations, its trials, its results, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_llm import session
from raytune_llm.atomic_file import write_atomically
from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.config.resources import INLINE, on_cluster, uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.config.sweep import COMMAND, Chosen, Sweep, command_of
from raytune_llm.data import pipeline
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.runs.nodes import check_nodes
from raytune_llm.runs.owner import check_writable, owned
from raytune_llm.tune.conduct import Conduct, OnChange
from raytune_llm.tune.disk import check_disk
from raytune_llm.tune.events import EVENTS
from raytune_llm.tune.metric import metric_of
from raytune_llm.tune.places import TrialPlace, run_at, workers_of
from raytune_llm.tune.results import write_plots, write_results
from raytune_llm.tune.study import BEST, PAGE, RESULTS, TABLE, Setting, Study
from raytune_llm.tune.trial import Train, libraries_set_aside, run_trial

if TYPE_CHECKING:
    from raytune_llm.runs.workspace import Workspace
    from raytune_llm.tune.shared import TrainTogether

RunTrials = Callable[[Conduct], None]
"""Trains the remaining trials of a sweep."""


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    best: Setting
    """The best finished trial, or the best paused one if none is finished."""
    study: Study

    @property
    def paused(self) -> bool:
        """Whether trials wait for `tune resume`."""
        return bool(self.study.paused)

    @property
    def folder(self) -> Path:
        """The output folder of the best setting's first trial."""
        return self.best.trials[0].folder


def run_sweep(
    sweep: Sweep,
    train: Train,
    on_change: OnChange = lambda study, trial: None,
    *,
    train_together: TrainTogether | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Run what is left of the sweep. on_change is called when a trial begins, reports or ends. train_together: for trials that
    may share a base; notify gets a line where they do.

    Raises ConfigError and DataError for what can be known to fail before the first trial, and ResourceError where no trial
    came to its end.
    """
    metric = metric_of(sweep.tune)
    check_writable(sweep.folder, TABLE, RESULTS, BEST, PAGE, EVENTS, COMMAND)
    with owned(sweep.folder):
        study = Study(sweep, metric, _adopt)
        if sweep.chosen is not None:
            check_choice(study, sweep.chosen)
        from raytune_llm.runs.output import full_disk_explained  # torch takes seconds to import

        with full_disk_explained(sweep.folder):
            with _ready(sweep, train, train_together, notify) as run_trials:
                _run(study, run_trials, on_change)
            return _result(study)


def _adopt(run: TrainRun, donor: Path) -> int:
    from raytune_llm.runs.output import adopt

    return adopt(run, donor)


def _run(study: Study, run_trials: RunTrials, on_change: OnChange) -> None:
    write_atomically(study.sweep.folder / COMMAND, command_of(study.sweep))
    try:
        if study.sweep.chosen is not None:
            choose(study, study.sweep.chosen)
        run_trials(Conduct(study, on_change))
    finally:
        study.close()
        write_results(study)
        write_plots(study)


def _result(study: Study) -> TuneResult:
    if study.ranked:
        return TuneResult(best=study.ranked[0], study=study)
    if study.paused:
        first = study.paused[0]
        return TuneResult(best=Setting(point=first.point, trials=(first,)), study=study)
    reasons = [trial.reason for trial in study.trials if trial.reason]
    raise ResourceError(f"no trial came to its end: {reasons[0] if reasons else 'all were stopped'}", "See trials.csv.")


def check_choice(study: Study, chosen: Chosen) -> None:
    """Raises ConfigError where no trial waits, or not the one that is to be cloned, or its values don't go with the others."""
    if study.interrupted and not study.paused:
        return  # it was chosen before an interruption
    if not study.paused:
        raise ConfigError("tune resume", "needs a sweep that is paused (tune.pause_at)", got=str(study.sweep.folder))
    if chosen.clone is not None and chosen.clone not in (trial.number for trial in study.paused):
        numbers = ", ".join(str(trial.number) for trial in study.paused)
        raise ConfigError("clone", "must be a trial that is paused", got=chosen.clone, fix=f"There are {numbers}.")
    if chosen.clone is not None:
        study.sweep.composed({**study.trials[chosen.clone].point, **chosen.changes})


def choose(study: Study, chosen: Chosen) -> None:
    """Which of the trials that wait resume. What was chosen already, before an interruption, is not chosen again."""
    if not study.paused:
        return
    if chosen.clone is not None:
        origin = study.trials[chosen.clone]
        point = {**origin.point, **chosen.changes}
        if not any(trial.asked is None and trial.point == point for trial in study.trials):
            study.clone(origin, chosen.changes)
    if chosen.keep is not None:
        study.release(study.paused[: chosen.keep])


@contextmanager
def _ready(
    sweep: Sweep, train: Train, train_together: TrainTogether | None, notify: Callable[[str], None]
) -> Iterator[RunTrials]:
    """A function that trains the trials, after everything is checked and prepared. torch is loaded here, even with
    resources=local: the runs are checked on a model without weights, so that an impossible sweep is refused before Ray starts."""
    from torch.cuda import device_count

    from raytune_llm.runs import preflight
    from raytune_llm.runs.together import device_here, room_for
    from raytune_llm.runs.workspace import Workspace
    from raytune_llm.tune.shared import run_banks, trials_together

    runs, workspace = _distinct(sweep), Workspace(keeps_base=True)
    for run in runs:
        preflight.check(run, workspace)
    if sweep.base.adapter.trains_base:
        check_disk(sweep, _checkpoint_bytes(sweep.base))
    _notify_of_schedule(sweep, notify)
    workspace.checked = True  # a trial that fails for its combination of values fails by itself
    size, why = trials_together(sweep, partial(room_for, device=device_here(), workspace=workspace), gpus=device_count())
    if size > 1 and train_together is not None:
        notify(f"{size} trials at a time, in one pass over one base ({why})")
        _prepare([replace(run, resources=INLINE) for run in runs], workspace)
        with libraries_set_aside():
            yield partial(run_banks, size=size, train_together=partial(train_together, workspace=workspace))
    elif not uses_ray(sweep.run.resources):
        _prepare(runs, workspace)
        with libraries_set_aside():
            yield partial(_run_here, train=partial(train, workspace=workspace))
    else:
        with _on_ray(sweep, train, runs, notify) as places:
            yield partial(run_at, places)


def _notify_of_schedule(sweep: Sweep, notify: Callable[[str], None]) -> None:
    schedule = sweep.base.schedule
    if sweep.tune.rounds and schedule.follows_total:
        notify(
            f"schedule={schedule.name} changes the learning rate up to the last step, beside what trials take over with "
            f"tune.scheduler={sweep.tune.scheduler}; schedule=constant leaves it to them"
        )


def _checkpoint_bytes(run: TrainRun) -> int:
    """The least size of a checkpoint: the weights as they are saved at the end, and the optimizer's state of one worker."""
    from raytune_llm.runs.plan import plan

    planned = plan(run)
    return planned.saved_bytes + planned.memory.optimizer


def _run_here(conduct: Conduct, train: Train) -> None:
    """Train the trials in this process, one after another."""
    while (found := conduct.next()) is not None:
        trial, run = found
        conduct.ended(trial, run_trial(run, conduct.study.metric, partial(conduct.reported, trial), train))


@contextmanager
def _on_ray(sweep: Sweep, train: Train, runs: list[TrainRun], notify: Callable[[str], None]) -> Iterator[list[TrialPlace]]:
    resources = sweep.run.resources
    assert uses_ray(resources)
    grouped = workers_of(resources) > 1 or not sweep.base.fits_one_process
    session.connect(resources)
    from raytune_llm.runs.workspace import Workspace
    from raytune_llm.tune.onray import places_on_ray  # ray takes seconds to import

    if on_cluster(resources) and not grouped:  # a group's nodes are looked at by its first trial
        base = with_absolute_paths(sweep.base)
        folders = {"output_dir": base.output_dir, "data.cache": base.data.cache}
        check_nodes(resources, folders, workers=1, each={"CPU": 1.0}, report=notify)
    _prepare(runs, Workspace())
    with places_on_ray(sweep, train, runs) as places:
        yield places


def _prepare(runs: list[TrainRun], workspace: Workspace) -> None:
    """Prepare the token stores, once for all trials that share them."""
    for run in runs:
        if not run.data.streaming:
            make = partial(pipeline.prepare, run.model, run.data, run.resources, kind=run.stage.kind)
            workspace.once("stores", (run.model, run.data, run.stage.kind), make)


def _distinct(sweep: Sweep) -> list[TrainRun]:
    """The base, and a run for each value, and each point that is known to be good, that changes more than how it is optimized."""
    return list({_needs(run): run for run in _each_end(sweep)}.values())


def _each_end(sweep: Sweep) -> Iterator[TrainRun]:
    for point in ({}, *sweep.ends, *sweep.tune.first):
        yield with_absolute_paths(replace(sweep.composed(point), output_dir=str(sweep.folder)))


def _needs(run: TrainRun) -> str:
    return repr((run.model, run.data, run.stage, run.adapter, run.quantization, run.strategy))

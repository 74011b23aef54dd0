"""Submits a run or a sweep as a Ray job, after checking everything that can be checked here, and follows its log."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from raytune_llm.cluster.job_log import JobLog
from raytune_llm.cluster.jobs import COMMAND, Job, Jobs, address_of, come_back, environment_of
from raytune_llm.cluster.package import files_of
from raytune_llm.cluster.requirements import requirements
from raytune_llm.cluster.travel import check_entries, is_carried, on_cluster, place_of
from raytune_llm.config.override_syntax import as_override
from raytune_llm.config.paths import changed_paths, expanded, value_of
from raytune_llm.config.plain import to_yaml
from raytune_llm.config.run import SubmitRun, as_train_run
from raytune_llm.config.sweep import SubmittedSweep, Sweep
from raytune_llm.errors import ResourceError
from raytune_llm.report.display import Display
from raytune_llm.report.events import OF_ANOTHER_VERSION, event_of, show


def submit(run: SubmitRun | SubmittedSweep) -> Job:
    """Submit a run or a sweep. The cluster starts the job when it has room. Raises ConfigError before anything is uploaded."""
    settings = run.submit
    address = address_of(settings.address)
    folder = expanded(settings.folder).absolute()
    files = {} if settings.image is not None else files_of(folder, settings.ignore, max_mib=settings.max_mib)
    sent = job_of(run.sweep if isinstance(run, SubmittedSweep) else run, folder, files)
    packages = [] if settings.requirements is None else requirements(settings.requirements)
    jobs = Jobs(address)
    job = jobs.submit(
        sent.name,
        sent.command,
        files=files,
        requirements=packages,
        image=settings.image,
        env={**settings.env, **sent.env},
        output_dir=sent.output_dir,
    )
    try:
        return jobs.get(job)
    except ResourceError as error:
        raise ResourceError(f"{job} was submitted, and then {error.lacking}", come_back(job, address)) from None


@dataclass(frozen=True)
class Sent:
    """What the cluster runs."""

    name: str
    output_dir: str
    command: str
    env: Mapping[str, str]


def job_of(run: SubmitRun | Sweep, folder: Path, files: Mapping[str, Path]) -> Sent:
    """folder: travels with `files`. Raises ConfigError for a path that the job could not find there."""
    if isinstance(run, Sweep):
        return _of_sweep(run, folder, files)
    training = on_cluster(as_train_run(run), folder, files)
    check_entries(run, files)
    return Sent(run.name, training.output_dir, COMMAND, environment_of(to_yaml(training)))


def _of_sweep(sweep: Sweep, folder: Path, files: Mapping[str, Path]) -> Sent:
    """The words of the sweep as they were typed, and its base's paths as the job has them."""
    for point in sweep.planned:
        composed = sweep.composed(point)
        on_cluster(composed, folder, files)
        check_entries(composed, files)
    base = on_cluster(sweep.base, folder, files)
    changed = changed_paths(sweep.base, base)
    # What the package carries is found there by the same words.
    own = {setting: value for setting, value in changed.items() if not is_carried(value_of(sweep.base, setting))}
    words = [*sweep.command, *(as_override(setting, value) for setting, value in own.items())]
    flags: list[str] = []
    if sweep.config_dir is not None:
        flags += ["--config-dir", place_of("--config-dir", expanded(str(sweep.config_dir)), folder, files)]
    if sweep.config_name is not None:
        flags += ["--config-name", sweep.config_name]
    command = shlex.join(["python", "-u", "-m", "raytune_llm", "tune", *flags, *words, "log_format=json"])
    return Sent(sweep.run.name, base.output_dir, command, {})


def follow(jobs: Jobs, job: str, display: Display, tell: Callable[[str], None]) -> JobLog:
    """Show a job as a run here would show itself, from its beginning to its end. `tell` gets the lines that are not of
    the run itself, and is called where the connection was lost."""
    log = JobLog()
    try:
        for text in jobs.lines(job, tell):
            event = event_of(text)
            if event is None:
                tell(text)
                continue
            try:
                log.read(event)
                show(event, display)
            except OF_ANOTHER_VERSION:
                tell(text)
    finally:
        display.close()
    return log

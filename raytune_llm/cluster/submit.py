"""A run as a job of a Ray cluster: what it needs is checked and sent, and its log is followed to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from raytune_llm.cluster.job_log import JobLog
from raytune_llm.cluster.jobs import COMMAND, Job, Jobs, address_of, environment_of
from raytune_llm.cluster.package import files_of
from raytune_llm.cluster.requirements import requirements
from raytune_llm.cluster.travel import on_cluster
from raytune_llm.config.load import to_yaml
from raytune_llm.config.run import SubmitRun, TrainRun
from raytune_llm.report.display import Display
from raytune_llm.report.events import event_of, show


def submit(run: SubmitRun) -> Job:
    """The job, which the cluster has and starts when it can. What can be refused is refused before anything is sent."""
    settings = run.submit
    address = address_of(settings.address)
    folder = Path(settings.folder).expanduser().absolute()
    files = {} if settings.image is not None else files_of(folder, settings.ignore, max_mib=settings.max_mib)
    training = on_cluster(_training(run), folder, files)
    packages = [] if settings.requirements is None else requirements(settings.requirements)
    jobs = Jobs(address)
    job = jobs.submit(
        run.name,
        COMMAND,
        files=files,
        requirements=packages,
        image=settings.image,
        env={**settings.env, **environment_of(to_yaml(training))},
        output_dir=training.output_dir,
    )
    return jobs.get(job)


def follow(jobs: Jobs, job: str, display: Display, *, line: Callable[[str], None], told: Callable[[str], None]) -> JobLog:
    """Show a job as a run here would show itself, from its beginning to its end. `line` gets what is not of the run itself;
    `told` hears of lost connections."""
    log = JobLog()
    try:
        for text in jobs.lines(job, told):
            event = event_of(text)
            if event is None:
                line(text)
                continue
            log.read(event)
            show(event, display)
    finally:
        display.close()
    return log


def _training(run: SubmitRun) -> TrainRun:
    return TrainRun(**{field.name: getattr(run, field.name) for field in fields(TrainRun)})  # pyright: ignore[reportArgumentType]  # pydantic's dataclasses are dataclasses

"""Submits a run as a Ray job, after checking everything that can be checked here, and follows its log."""

from __future__ import annotations

from collections.abc import Callable

from raytune_llm.cluster.job_log import JobLog
from raytune_llm.cluster.jobs import COMMAND, Job, Jobs, address_of, environment_of
from raytune_llm.cluster.package import files_of
from raytune_llm.cluster.requirements import requirements
from raytune_llm.cluster.travel import on_cluster
from raytune_llm.config.paths import expanded
from raytune_llm.config.plain import to_yaml
from raytune_llm.config.run import SubmitRun, as_train_run
from raytune_llm.report.display import Display
from raytune_llm.report.events import event_of, show


def submit(run: SubmitRun) -> Job:
    """Submit a run. The cluster starts the job when it has room. Raises ConfigError before anything is uploaded."""
    settings = run.submit
    address = address_of(settings.address)
    folder = expanded(settings.folder).absolute()
    files = {} if settings.image is not None else files_of(folder, settings.ignore, max_mib=settings.max_mib)
    training = on_cluster(as_train_run(run), folder, files)
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
            log.read(event)
            show(event, display)
    finally:
        display.close()
    return log

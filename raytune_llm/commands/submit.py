"""`submit`: sends a run (or a sweep, as `submit tune`) to a Ray cluster as a job, and follows it from this machine."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from raytune_llm import api, interrupts
from raytune_llm.cluster.job_log import JobLog
from raytune_llm.cluster.jobs import Job, Jobs, address_of, come_back, open_to_all
from raytune_llm.cluster.submit import follow
from raytune_llm.config.run import SubmitRun
from raytune_llm.config.sweep import SubmittedSweep
from raytune_llm.errors import ResourceError
from raytune_llm.report.display import Display


def main(run: SubmitRun | SubmittedSweep) -> int:
    console = Console()
    address = known_address(console, run.submit.address)
    job = api.submit(run)
    say(console, f"job {job.id} was submitted to {address}")
    if run.submit.detach:
        say(console, come_back(job.id, address))
        return 0
    return follow_to_its_end(console, Jobs(address), job, Path(run.submit.results))


def known_address(console: Console, setting: str | None) -> str:
    """The address of the cluster's dashboard. Prints a warning if it needs no token and is not on this machine."""
    address = address_of(setting)
    if (warning := open_to_all(address)) is not None:
        say(console, f"warning: {warning}")
    return address


def follow_to_its_end(console: Console, jobs: Jobs, job: Job, results: Path) -> int:
    """Follow the job until it ends and return its driver's exit code. Ctrl-C and SIGTERM detach from the job, which keeps
    running."""
    try:
        log = follow(jobs, job.id, Display(console), lambda text: say(console, text))
    except KeyboardInterrupt as interrupt:
        say(console, f"\ndetached: {job.id} keeps running. {come_back(job.id, jobs.address)}")
        say(console, f"Stop it with: python -m raytune_llm jobs stop {job.id} submit.address={jobs.address}")
        return interrupts.exit_code(interrupt)
    ended = jobs.get(job.id)
    if (log.done is not None or log.files) and ended.output_dir is not None:
        say(console, f"Paths and commands above are the cluster's. The run is in {ended.output_dir}.")
    try:
        fetch(console, log, job.id, results)
    except ResourceError as error:
        say(console, f"warning: {error}")  # the exit code is the job's
    if ended.outcome:
        say(console, f"{job.id} {ended.status.lower()}: {ended.reason}")
    return ended.outcome


def fetch(console: Console, log: JobLog, job: str, results: Path) -> bool:
    """Write the small result files that a job printed to its log. Returns False if the log holds none. Raises ResourceError if
    they can't be written."""
    folder = results / job
    try:
        written = log.write(folder)
    except OSError as error:
        raise ResourceError(
            f"{folder} can't be written ({error.strerror}); the job does not need it",
            f"Repeat `python -m raytune_llm jobs fetch {job}` with submit.results=FOLDER.",
        ) from None
    if written:
        say(console, f"fetched to {folder}: {', '.join(written)}")
    return bool(written)


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

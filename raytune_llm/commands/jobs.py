"""`jobs`: list the jobs that `submit` sent to a Ray cluster, or show, follow, stop or fetch one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from raytune_llm.cluster.job_log import JobLog, read
from raytune_llm.cluster.jobs import Job, Jobs
from raytune_llm.commands.submit import fetch, follow_to_its_end, known_address, say
from raytune_llm.config.run import JobsRun
from raytune_llm.errors import ResourceError
from raytune_llm.report.facts import print_facts

LISTED = 20
STOP_WAITS_S = 60.0


def main(run: JobsRun) -> int:
    console = Console()
    return ACTIONS[run.action](console, Jobs(known_address(console, run.submit.address)), run)


def _list(console: Console, jobs: Jobs, run: JobsRun) -> int:
    found = jobs.all()
    if not found:
        say(console, f"{jobs.address} has no jobs")
        return 0
    table = Table("run", "job", "status", "step", "loss", "left", "took", box=None, padding=(0, 2, 0, 0))
    for job in found[:LISTED]:
        log = _log_of(console, jobs, job)
        table.add_row(*(escape(text) for text in (job.run, job.id, job.status.lower(), *_how_far(log), _took(job))))
    _print_whole(console, table)
    if len(found) > LISTED:
        say(console, f"and {len(found) - LISTED} older ones")
    return 0


def _print_whole(console: Console, table: Table) -> None:
    """Wider than the terminal where it must be: names in it are copied."""
    wide = Measurement.get(console, console.options.update(width=1_000), table).maximum
    Console(file=console.file, width=max(console.width, wide)).print(table, highlight=False)


def _status(console: Console, jobs: Jobs, run: JobsRun) -> int:
    job = jobs.find(run.job or "")
    step, loss, left = _how_far(_log_of(console, jobs, job))
    facts = {
        "run": job.run,
        "job": job.id,
        "status": job.status.lower(),
        "exit code": "" if job.exit_code is None else str(job.outcome),
        "step": step,
        "loss": loss,
        "left": left,
        "took": _took(job),
        "output": job.output_dir or "",
        "message": job.reason,
    }
    print_facts(console, [(name, escape(value)) for name, value in facts.items() if value])
    return 0


def _logs(console: Console, jobs: Jobs, run: JobsRun) -> int:
    return follow_to_its_end(console, jobs, jobs.find(run.job or ""), Path(run.submit.results))


def _stop(console: Console, jobs: Jobs, run: JobsRun) -> int:
    job = jobs.find(run.job or "")
    if job.has_ended:
        say(console, f"{job.id} had ended: {job.status.lower()}")
        return 0
    jobs.stop(job.id)
    until = time.monotonic() + STOP_WAITS_S
    while not jobs.get(job.id).has_ended:
        if time.monotonic() > until:
            say(console, f"{job.id} was asked to stop {STOP_WAITS_S:g} s ago and has not ended yet")
            return 1
        time.sleep(0.5)
    say(console, f"{job.id} stopped; the same run, submitted again, resumes from its newest checkpoint")
    return 0


def _fetch(console: Console, jobs: Jobs, run: JobsRun) -> int:
    job = jobs.find(run.job or "")
    if not fetch(console, read(jobs.log(job.id).splitlines()), job.id, Path(run.submit.results)):
        say(console, f"{job.id} has reported nothing yet")
    return 0


ACTIONS: Mapping[str, Callable[[Console, Jobs, JobsRun], int]] = {
    "list": _list,
    "status": _status,
    "logs": _logs,
    "stop": _stop,
    "fetch": _fetch,
}


def _log_of(console: Console, jobs: Jobs, job: Job) -> JobLog:
    """Empty where the log can't be read: it is on the node of the job's driver, which may be gone."""
    try:
        return read(jobs.log(job.id).splitlines())
    except ResourceError as error:
        say(console, f"warning: the log of {job.id} can't be read ({error.lacking})")
        return JobLog()


def _how_far(log: JobLog) -> tuple[str, str, str]:
    """Step, loss and time left, each empty if it is not known."""
    step = "" if log.step is None else f"{log.step:,}/{log.total_steps:,}" if log.total_steps else f"{log.step:,}"
    loss = "" if log.loss is None else f"{log.loss:.4f}"
    return step, loss, "" if log.left_s is None or log.done is not None else str(timedelta(seconds=round(log.left_s)))


def _took(job: Job) -> str:
    if job.started is None:
        return ""
    return str(timedelta(seconds=round((job.ended or time.time()) - job.started)))

"""The places in which a sweep's trials train concurrently, and their number.

A place is a function that trains one run after another. Each has a thread here, which waits for its trial; the study, which is
asked at each report, belongs to the main thread alone.

Ray Tune is not used. The study has a log, from which an interrupted sweep is resumed to the same numbers, and searchers and
schedulers that can be asked again for that. Tune would keep a second book of the same trials, with checkpoints and a restore of
its own. What is left of it, a process for each place, is an actor (onray.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Queue

from raytune_llm.config.resources import Cluster, Local
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError
from raytune_llm.tune.conduct import Conduct
from raytune_llm.tune.trial import Outcome, Reported, Trial

TrialPlace = Callable[[TrainRun, Reported], Outcome]
PARTS = 10_000
"""The number of parts that Ray divides a GPU into."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many trials run at once, and the resources of each of their workers."""

    count: int
    cpus: float
    gpus: float


def share_of(resources: Local | Cluster, there: Mapping[str, float], *, most: int | None, fit: int) -> Share:
    """there: CPUs and GPUs of the cluster. most: maximum number of trials at once. fit: number of single-worker trials that fit
    in the memory of a GPU, or of a host without GPUs. Raises ConfigError if not even one trial has a place."""
    workers = workers_of(resources)
    cpus_there, gpus_there = there.get("CPU", 0.0), there.get("GPU", 0.0)
    cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    if gpus == "auto":
        gpus = 0.0 if not gpus_there else 1.0 if workers > 1 else int(PARTS / max(fit, 1)) / PARTS
    room = _times(gpus_there, gpus * workers) if gpus else fit if workers == 1 else _times(cpus_there, workers)
    wanted = max(1, room if most is None else min(room, most))
    if cpus == "auto":
        each = cpus_there / (wanted * workers)
        cpus = min(1.0, each) if gpus else 1.0 if most is None else max(1.0, float(int(each)))
    count = min(wanted, _times(cpus_there, cpus * workers)) if room else 0
    if count < 1:
        raise ConfigError(
            "resources.num_workers",
            f"with {cpus:g} CPUs and {gpus:g} GPUs each must find a place among the {cpus_there:g} CPUs and {gpus_there:g} GPUs",
            got=workers,
            fix="Lower it, or what each has.",
        )
    return Share(count=count, cpus=float(cpus), gpus=float(gpus))


def workers_of(resources: Local | Cluster) -> int:
    """Number of workers of each trial."""
    return resources.num_workers if isinstance(resources.num_workers, int) else 1


def _times(there: float, each: float) -> int:
    return int((there + 1e-6) // each)


@dataclass(frozen=True)
class TrialReport:
    trial: Trial
    step: int
    total_steps: int
    value: float
    answer: Queue[bool]


@dataclass(frozen=True)
class End:
    trial: Trial
    place: TrialPlace
    outcome: Outcome | BaseException


def run_at(places: Sequence[TrialPlace], conduct: Conduct) -> None:
    """Train all trials, as many at once as there are places. Raises what a place raises."""
    free, news, running = list(places), Queue[TrialReport | End](), 0
    while True:
        while free and (found := conduct.next()) is not None:
            trial, run = found
            place = free.pop()  # the one that trained last, since its process is there
            arguments = (place, trial, run, news)
            threading.Thread(target=_train, args=arguments, name=f"trial {trial.number}", daemon=True).start()
            running += 1
        if not running:
            return
        match news.get():
            case TrialReport() as report:
                report.answer.put(conduct.reported(report.trial, report.step, report.total_steps, report.value))
            case End(trial, place, Outcome() as outcome):
                running -= 1
                free.append(place)
                conduct.ended(trial, outcome)
            case End(outcome=BaseException() as failure):
                raise failure


def _train(place: TrialPlace, trial: Trial, run: TrainRun, news: Queue[TrialReport | End]) -> None:
    def reported(step: int, total_steps: int, value: float) -> bool:
        answer = Queue[bool]()
        news.put(TrialReport(trial, step, total_steps, value, answer))
        return answer.get()

    try:
        outcome: Outcome | BaseException = place(run, reported)
    except BaseException as failure:
        outcome = failure
    news.put(End(trial, place, outcome))

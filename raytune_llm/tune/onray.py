"""Places on a Ray cluster: an actor each, which trains one trial after another. One of the few files that import ray.

An actor keeps what trials share (runs/workspace.py), so a trial after its first imports and loads nothing. There is no trainer
inside: one that is stopped early unwinds in its process, and its part of the cluster is free for the next. A trial of several
workers is a Ray Train group, driven from a thread of this process (see launch.py); it ends with its trial.

An actor that dies is started again, and its trial resumes from its own output folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from raytune_llm.config.resources import INLINE, Cluster, Local, on_cluster, uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.config.sweep import Sweep
from raytune_llm.config.tune import TuneConfig
from raytune_llm.runs.group_size import ROOM_AFTER_S, warn_without_room
from raytune_llm.runs.owner import wait_until_free
from raytune_llm.runs.pulse import PULSE_GROUP, Beating, Frozen, Pulse
from raytune_llm.runs.remote_task import call_with
from raytune_llm.tune.metric import metric_of
from raytune_llm.tune.places import Share, TrialPlace, share_of, workers_of
from raytune_llm.tune.trial import Outcome, Reported, Train, run_trial, set_libraries_aside

log = logging.getLogger(__name__)
MESSAGES = "messages"


class TrialProcess(Beating):
    """An actor that trains trials. `run` trains in one thread, while other threads pass reports and answers on."""

    def __init__(self, train: Train, tune: TuneConfig, cpus: float) -> None:
        from raytune_llm.runs.workspace import Workspace  # it loads torch, and the driver imports this file, too

        set_libraries_aside()
        self._train = partial(train, workspace=Workspace(keeps_base=True, checked=True))
        self._metric, self._threads = metric_of(tune), max(1, int(cpus))
        self._reports, self._answers = Queue[tuple[int, int, float]](), Queue[bool]()

    def run(self, run: TrainRun) -> Outcome:
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(self._threads)
        wait_until_free(Path(run.output_dir))
        return run_trial(run, self._metric, self._reported, self._train)

    def report(self) -> tuple[int, int, float]:
        """The next report. Blocks until it comes."""
        return self._reports.get()

    def answer(self, goes_on: bool) -> None:
        self._answers.put(goes_on)

    def _reported(self, step: int, total_steps: int, value: float) -> bool:
        self._reports.put((step, total_steps, value))
        return self._answers.get()


class ActorPlace:
    """An actor, started when its first trial comes.

    others: the sweep's places. Where a node is lost, its trials need the room of actors elsewhere that have nothing to train.
    """

    def __init__(
        self, train: Train, tune: TuneConfig, share: Share, resources: Local | Cluster, others: Sequence[ActorPlace]
    ) -> None:
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "concurrency_groups": {MESSAGES: 2, **PULSE_GROUP}}
        self._start = partial(ray.remote(**options)(TrialProcess).remote, train, tune, share.cpus)
        self._needs = {"CPU": share.cpus, "GPU": share.gpus}
        self._max_failures, self._limit_s = resources.max_failures, resources.collective_timeout_s
        self._others = others
        self._trains = Lock()
        """Held while a trial trains."""
        self._actor: Any = None
        self._pulse: Any = None
        self._report: Any = None
        """The next one of the actor, which it is waiting for; it outlives a trial."""
        self._closed = False

    def __call__(self, run: TrainRun, reported: Reported) -> Outcome:
        with self._trains:
            return self._train(replace(run, resources=INLINE), reported)

    def _train(self, run: TrainRun, reported: Reported) -> Outcome:
        how = ""
        for _ in range(self._max_failures + 1):
            try:
                return self._run(run, reported)
            except RayError as error:
                if self._closed or not isinstance(error, RayActorError | OutOfMemoryError):
                    raise
                how = "out of memory" if "memory" in str(error) else "killed, or its node is gone"
                self._end()
            except Frozen as frozen:
                log.warning("%s; trial %s starts again from its newest checkpoint", frozen, Path(run.output_dir).name)
                how = "it did not answer"
                self._end()
        reason = f"its process died {self._max_failures + 1} times ({how})"
        return Outcome(state="failed", value=None, reason=reason, again=True)

    def close(self) -> None:
        self._closed = True
        self._end()

    def yields(self) -> bool:
        """End the actor if it has nothing to train; the next trial starts it again. Returns False if there was none to end."""
        if not self._trains.acquire(blocking=False):
            return False
        try:
            idle = self._actor is not None
            self._end()
            return idle
        finally:
            self._trains.release()

    def _end(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)

    def _run(self, run: TrainRun, reported: Reported) -> Outcome:
        if self._actor is None:
            self._actor = self._start()
            started = self._actor.__ray_ready__.remote()
            while not ray.wait([started], timeout=ROOM_AFTER_S)[0]:
                if not any(place.yields() for place in self._others):
                    warn_without_room(1, self._needs)
            self._pulse = Pulse(self._actor, "the process of a trial", self._limit_s)
            self._report = self._messages("report").remote()
        done = self._actor.run.remote(run)
        while True:
            if self._pulse.wait([self._report, done]) == done:
                return ray.get(done)
            step, total_steps, value = ray.get(self._report)
            self._report = self._messages("report").remote()
            self._messages("answer").remote(reported(step, total_steps, value))

    def _messages(self, method: str) -> Any:
        return getattr(self._actor, method).options(concurrency_group=MESSAGES)


class TrainerPlace:
    """Ray Train groups, one for each trial."""

    def __init__(self, train: Train, tune: TuneConfig, share: Share) -> None:
        from raytune_llm.runs.workspace import Workspace

        self._train, self._metric, self._share = partial(train, workspace=Workspace(checked=True)), metric_of(tune), share
        self._checked = False

    def __call__(self, run: TrainRun, reported: Reported) -> Outcome:
        resources = run.resources
        assert uses_ray(resources)
        resources = replace(resources, cpus_per_worker=self._share.cpus, gpus_per_worker=self._share.gpus)
        if on_cluster(resources) and self._checked:
            resources = replace(resources, preflight="off")  # nodes are looked at once
        self._checked = True
        return run_trial(replace(run, resources=resources), self._metric, reported, self._train)

    def close(self) -> None:
        """Nothing to do: a group ends with its trial, or with this process."""


@contextmanager
def places_on_ray(sweep: Sweep, train: Train, runs: Sequence[TrainRun]) -> Iterator[list[TrialPlace]]:
    """The places of a sweep on the connected cluster. runs: one for each different need. The context ends what was started."""
    resources, tune = sweep.run.resources, sweep.tune
    assert uses_ray(resources)
    grouped = workers_of(resources) > 1 or not all(run.fits_one_process for run in runs)
    fit = 1 if grouped else fits(runs, resources, on_gpu=bool(ray.cluster_resources().get("GPU")))
    share = share_of(resources, ray.cluster_resources(), most=tune.max_concurrent, fit=fit)
    if grouped:
        places = [TrainerPlace(train, tune, share) for _ in range(share.count)]
    else:
        actors: list[ActorPlace] = []
        actors += [ActorPlace(train, tune, share, resources, actors) for _ in range(share.count)]
        places = actors
    try:
        yield list(places)
    finally:
        for place in places:
            place.close()


def fits(runs: Sequence[TrainRun], resources: Local | Cluster, *, on_gpu: bool) -> int:
    """How many of the largest of these runs fit at once in the memory of a GPU, or of this host if there is none. At least one:
    if a plan says that none fits, one is tried."""
    if on_gpu:
        return call_with({"CPU": 0.0, "GPU": 1.0}, resources, partial(_fits, runs))
    return _fits(runs)


def _fits(runs: Sequence[TrainRun]) -> int:
    from raytune_llm.memory.footprint import USABLE
    from raytune_llm.runs.plan import plan

    verdicts = [plan(replace(run, resources=INLINE), in_sweep=True).verdicts[0] for run in runs]
    return max(1, int(USABLE * verdicts[0].device.memory // max(verdict.memory.total for verdict in verdicts)))

"""A group of training workers that Ray Train starts, monitors and restarts. [ray]"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from raytune_llm import session
from raytune_llm.config.resources import Cluster, Local, on_cluster, worker_counts
from raytune_llm.config.rules import steps_have_one_micro_batch
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, ResourceError, RunLost
from raytune_llm.object_store import RemoteFolder, is_address
from raytune_llm.report.metrics import Sink
from raytune_llm.report.updates import EndOfRun, Notice, SampledAnswer, Update
from raytune_llm.runs.channel import Channel
from raytune_llm.runs.elastic import RoomToGrow, of_all, wait_for_room
from raytune_llm.runs.faults import WorkersWait
from raytune_llm.runs.group_size import GroupSize, Waiting, check_fits, group_size, reserved_cpus
from raytune_llm.runs.group_worker import worker_main
from raytune_llm.runs.live_nodes import Leaving, node_ids
from raytune_llm.runs.outcome import TrainOutcome
from raytune_llm.runs.ray_failures import cause
from raytune_llm.runs.ray_metrics import RayMetrics
from raytune_llm.runs.remote_output import remote_folder, saved_steps, work_folder
from raytune_llm.runs.restarts import Failures, Restarts

if TYPE_CHECKING:
    from raytune_llm.runs.group_trainer import GroupTrainer

log = logging.getLogger(__name__)
POLL_S = 0.2
RAYS_FOLDER = ".ray"
ENDS_WITHIN_S = 5.0
"""Longest wait for the workers of an interrupted group. They end with this process at the latest."""
START_S = "30"
STARTS_WITHIN_S = 120.0
"""Workers that have their resources may take so long to start, at least: packages on shared storage take long to import."""
LEAVES = "a node is being taken away"
COLLECTIVES = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Device type -> torch's back ends for collectives. GPU workers also have gloo, for parameters that are offloaded to host
memory."""


def fit_on_ray(
    run: TrainRun,
    resources: Local | Cluster,
    train_store: str,
    eval_store: str | None,
    *,
    sinks: Sequence[Sink],
    on_update: Callable[[Update], None],
    on_samples: Callable[[Sequence[SampledAnswer]], None],
) -> TrainOutcome:
    """Train in groups of Ray Train workers. A group that fails is started again, up to max_failures times within an hour.
    Callbacks are called in this process.

    Raises UserError for errors that the user can fix, and the error of a callback.
    """
    session.connect(resources)
    reserved = reserved_cpus(run)
    size = group_size(resources, reserved_cpus=reserved)
    steps_have_one_micro_batch(run.optimizer, run.train, size.workers)
    run.train.micro_batches(size.workers)
    try:
        check_fits(size, reserved_cpus=reserved)
    except ConfigError:
        if not on_cluster(resources) or not saved_steps(run.output_dir):
            raise  # a run that has started waits for its nodes to come back
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{resources.collective_timeout_s:g}"
    failures = Failures(limit=resources.max_failures)
    with closing(RayMetrics(run.name)) as metrics, _rays_folder(run.output_dir) as rays_folder:
        group = Group(
            run=run,
            resources=resources,
            stores=(train_store, eval_store),
            rays_folder=rays_folder,
            sinks=sinks,
            on_update=on_update,
            on_samples=on_samples,
        )
        metrics.measured("failures", 0)
        on_lost = partial(metrics.measured, "failures")
        if isinstance(resources.num_workers, list):
            return fit_elastic(group, size, resources.num_workers, failures, on_lost)
        return fit_fixed(group, size, failures, on_lost)


def fit_fixed(group: Group, size: GroupSize, failures: Failures, on_lost: Callable[[int], None]) -> TrainOutcome:
    """Train in groups of a fixed size."""
    restarts = Restarts(failures=failures, in_place=True, on_lost=on_lost)
    outcomes: list[TrainOutcome] = []
    while not outcomes or outcomes[-1].yielded:
        try:
            outcomes.append(group.fit(size, restarts))
        except GroupFailed as failed:
            raise failed.reason from None
        if outcomes[-1].yielded:
            group.on_update(Notice(text=f"saved at step {outcomes[-1].progress.step}, since {LEAVES}; resuming on others"))
    return of_all(outcomes)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The workers of a run. They can be started several times."""

    run: TrainRun
    resources: Local | Cluster
    stores: tuple[str, str | None]
    rays_folder: str
    """Of Ray Train, in the output folder."""
    sinks: Sequence[Sink]
    on_update: Callable[[Update], None]
    on_samples: Callable[[Sequence[SampledAnswer]], None]

    def fit(self, size: GroupSize, restarts: Restarts, *, grows: Callable[[], bool] = lambda: False) -> TrainOutcome:
        """Train from the newest checkpoint. grows: called from time to time. If it returns True, or if a node of the group
        drains, the workers are asked to save and end.

        Raises GroupFailed if the group failed and Ray does not start it again, UserError for errors that the user can fix, and
        the error of a callback.
        """
        restarts.begin()
        channel = Channel(
            work_folder(self.run.output_dir),
            saved_steps=partial(saved_steps, self.run.output_dir),
            stall_timeout_s=self.run.train.stall_timeout_s,
            sinks=self.sinks,
            on_update=self.on_update,
            on_samples=self.on_samples,
        )
        try:
            trainer = self._trainer(size, restarts, channel.inbox)
            leaving = Leaving(nodes_of_group=trainer.nodes)
            _fit(trainer, channel, size, lambda: grows() or leaving())
        except (EndOfRun, RunLost):
            raise
        except Exception as error:
            channel.close()
            if channel.lost is not None:
                raise channel.lost from None
            if channel.error is not None:
                raise channel.error from None
            if channel.callback_error is not None:
                raise channel.callback_error from None
            raise GroupFailed(cause(error, channel.last_loss)) from None
        channel.close()
        if channel.lost is not None:
            raise channel.lost
        if channel.error is not None:
            raise channel.error
        if channel.callback_error is not None:
            raise channel.callback_error
        assert channel.outcome is not None
        restarts.worked()
        return channel.outcome

    def _trainer(self, size: GroupSize, restarts: Restarts, inbox: Any) -> GroupTrainer:
        from ray.train import LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        from raytune_llm.runs.group_trainer import GroupTrainer

        resources = self.resources
        settings = {
            "run": self.run,
            "stores": self.stores,
            "inbox": inbox,
            "yields": on_cluster(resources),
            "threads": max(1, int(size.cpus)),
        }
        return GroupTrainer(
            worker_main,
            again=lambda error: restarts.again(error, inbox.put.remote),
            starts_within_s=max(STARTS_WITHIN_S, resources.collective_timeout_s),
            train_loop_config=settings,
            torch_config=TorchConfig(
                backend=COLLECTIVES["cuda" if size.gpus else "cpu"], timeout_s=max(1, round(resources.collective_timeout_s))
            ),
            scaling_config=ScalingConfig(
                num_workers=size.workers,
                use_gpu=size.gpus > 0,
                resources_per_worker={kind: amount for kind, amount in size.each.items() if kind == "CPU" or amount},
            ),
            run_config=RunConfig(
                name=f"group-{os.getpid()}-{secrets.token_hex(4)}",
                logging_config=LoggingConfig(log_level="CRITICAL"),  # only for the screen; Ray's log files have everything
                **_storage(self.run.output_dir, self.rays_folder, shared=on_cluster(resources)),
            ),
        )


class GroupFailed(Exception):
    """A group lost workers or could not start, and Ray does not start it again."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason
        """The error to show to the user."""


def fit_elastic(
    group: Group, smallest: GroupSize, num_workers: list[int], failures: Failures, on_lost: Callable[[int], None]
) -> TrainOutcome:
    """Train in one group after another, each as large as the cluster has room for (runs/elastic.py)."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = START_S  # short, since a node may leave before the group starts
    train = group.run.train
    counts = worker_counts(num_workers, train.global_batch_size // train.micro_batch_size)
    outcomes: list[TrainOutcome] = []
    nodes, before, wanted, why = set[str](), 0, None, ""
    restarts = Restarts(failures=failures, in_place=False, node_lost=lambda: bool(nodes - node_ids()), on_lost=on_lost)
    while True:
        workers = wait_for_room(counts, smallest.each, group.on_update, wanted=wanted)
        if why:
            size = f"{workers} worker{'' if workers == 1 else 's'}"
            group.on_update(Notice(text=f"{why}; resuming with {size} ({before} before)"))
        nodes, before = node_ids(), workers
        room = RoomToGrow(counts=counts, workers=workers, each=smallest.each)
        try:
            outcome = group.fit(replace(smallest, workers=workers), restarts, grows=room)
        except GroupFailed as failed:
            if not restarts.allowed:
                raise failed.reason from None
            wanted, why = workers, restarts.why
            continue
        outcomes.append(outcome)
        if not outcome.yielded:
            return of_all(outcomes)
        grown = room.found is not None and room.found > workers
        wanted = room.found if grown else workers
        why = f"saved at step {outcome.progress.step}, since {f'there is room for {wanted} workers' if grown else LEAVES}"


def _storage(output_dir: str, name: str, *, shared: bool) -> dict[str, Any]:
    """Where Ray Train stores its state of a run's groups: in the output folder. shared: all nodes of a cluster must see it."""
    remote = remote_folder(output_dir)
    if remote is None or not shared:
        return {"storage_path": str(work_folder(output_dir).resolve() / name)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": remote.path(name), "storage_filesystem": PyFileSystem(FSSpecHandler(remote.store))}


@contextmanager
def _rays_folder(output_dir: str) -> Iterator[str]:
    """A folder in the output folder, by name, that is gone after the block. What drivers left that were killed goes before it."""
    _remove(output_dir, RAYS_FOLDER)
    name = f"{RAYS_FOLDER}/{secrets.token_hex(4)}"
    try:
        yield name
    finally:  # no other one's: another driver may have taken the output folder
        _remove(output_dir, name)
        with suppress(OSError):
            (work_folder(output_dir) / RAYS_FOLDER).rmdir()


def _remove(output_dir: str, name: str) -> None:
    shutil.rmtree(work_folder(output_dir) / name, ignore_errors=True)
    if is_address(output_dir):
        with suppress(OSError, ResourceError):  # where the store is away, the run ends with that
            RemoteFolder(output_dir, patience_s=0.0).remove(name)


def _fit(trainer: GroupTrainer, channel: Channel, size: GroupSize, yields: Callable[[], bool]) -> None:
    """Run the trainer in a thread, where Ray can't install signal handlers.

    So an interrupt, or a callback's EndOfRun, ends the group even while it starts.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as failure:
            failures.append(failure)

    ended, look = threading.Event(), Look(trainer=trainer, channel=channel, size=size, yields=yields)
    thread = threading.Thread(target=run, name="trainer", daemon=True)
    thread.start()
    # In a thread, since a look asks the head, and waits for a minute if that is gone.
    threading.Thread(target=_watch, args=(look, ended), name="watch", daemon=True).start()
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            if isinstance(channel.callback_error, EndOfRun):
                raise channel.callback_error
            if channel.lost is not None:
                raise channel.lost
    except BaseException:
        channel.abort()
        trainer.end()
        thread.join(ENDS_WITHIN_S)
        raise
    finally:
        ended.set()
    if failures:
        raise failures[0]


@dataclass(kw_only=True)
class Look:
    """Looks at a group from the driver: what it waits for before it has resources, and whether it should save and end."""

    trainer: GroupTrainer
    channel: Channel
    size: GroupSize
    yields: Callable[[], bool]
    _waiting: Waiting | None = field(default=None, init=False)
    _asked: bool = field(default=False, init=False)

    def __call__(self) -> None:
        inbox = self.channel.inbox
        if self.trainer.waits():
            self._waiting = self._waiting or Waiting(size=self.size)
            if (line := self._waiting.line()) is not None:
                inbox.put.remote(WorkersWait(line=line))
            return
        if self._waiting is not None and self._waiting.said:
            inbox.put.remote(WorkersWait(line=None))
        self._waiting = None
        if self.channel.has_started and not self._asked and self.yields():  # a group that starts can't yield yet
            inbox.ask_to_yield.remote()
            self._asked = True


def _watch(look: Callable[[], None], ended: threading.Event) -> None:
    """Call `look` repeatedly. Errors of Ray are ignored, since the channel detects a lost cluster. Any other error is a bug: it
    is logged and ends the looking, not the training.
    """
    from ray.exceptions import RayError

    while not ended.wait(POLL_S):
        try:
            look()
        except RayError:
            continue
        except Exception:
            log.exception("the cluster is no longer watched: the group neither grows nor leaves a node that is taken away")
            return

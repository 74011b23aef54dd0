"""A group of training workers that Ray Train starts, monitors and restarts. [ray]"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raytune_llm import session
from raytune_llm.config.resources import Cluster, Local
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, UserError
from raytune_llm.report.metrics import Sink
from raytune_llm.report.updates import EndOfRun, SampledAnswer, Update
from raytune_llm.runs.channel import Channel
from raytune_llm.runs.faults import Heartbeat, WorkersLost
from raytune_llm.runs.group_size import GroupSize, check_fits, group_size, reserved_cpus, wait_until_free
from raytune_llm.runs.inbox import Message
from raytune_llm.runs.ray_failures import cause, how_it_ended
from raytune_llm.runs.worker import TrainOutcome, work
from raytune_llm.train.strategies.base import COLLECTIVES

POLL_S = 0.2
START_FAILURES = 3
"""The run fails after so many groups that could not be started."""


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
    """Train in workers of Ray Train, which restarts the group up to max_failures times. Callbacks are called in this process.

    Raises UserError for what the user can fix, and whatever a callback raised.
    """
    session.connect(resources)
    reserved = reserved_cpus(run)
    size = group_size(resources, reserved_cpus=reserved)
    _check_batch_size(run, size.workers)
    check_fits(size, reserved_cpus=reserved)
    wait_until_free(size, on_update)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{resources.collective_timeout_s:g}"
    channel = Channel(
        Path(run.output_dir),
        max_failures=resources.max_failures,
        stall_timeout_s=run.train.stall_timeout_s,
        sinks=sinks,
        on_update=on_update,
        on_samples=on_samples,
    )
    try:
        _fit(_trainer(run, resources, size, (train_store, eval_store), channel.inbox), channel)
    except EndOfRun:
        raise
    except Exception as error:
        channel.close()
        raise (channel.error or cause(error, channel.last_loss)) from None
    channel.close()
    if channel.error is not None:
        raise channel.error
    if channel.callback_error is not None:
        raise channel.callback_error
    assert channel.outcome is not None
    return channel.outcome


def _check_batch_size(run: TrainRun, workers: int) -> None:
    rows = workers * run.train.micro_batch_size
    if run.train.global_batch_size % rows:
        raise ConfigError(
            "train.global_batch_size",
            f"must be a multiple of train.micro_batch_size x {workers} workers = {rows}",
            got=run.train.global_batch_size,
            fix=f"Set it to {-(-run.train.global_batch_size // rows) * rows}, or set resources.num_workers.",
        )


def _trainer(run: TrainRun, resources: Local | Cluster, size: GroupSize, stores: tuple[str, str | None], inbox: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _worker_main,
        train_loop_config={"run": run, "stores": stores, "inbox": inbox, "threads": max(1, int(size.cpus))},
        torch_config=TorchConfig(
            backend=COLLECTIVES["cuda" if size.gpus else "cpu"], timeout_s=max(1, round(resources.collective_timeout_s))
        ),
        scaling_config=ScalingConfig(
            num_workers=size.workers,
            use_gpu=size.gpus > 0,
            resources_per_worker={kind: amount for kind, amount in size.each.items() if kind == "CPU" or amount},
        ),
        run_config=RunConfig(
            name=f"group-{os.getpid()}",
            callbacks=_callbacks(inbox),
            storage_path=str(Path(run.output_dir).resolve() / ".ray"),
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=START_FAILURES),
        ),
    )


def _fit(trainer: Any, channel: Channel) -> None:
    """Run the trainer in a thread, where Ray can't install signal handlers.

    So an interrupt, or a callback's EndOfRun, ends the group even while it starts.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="trainer", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            if isinstance(channel.callback_error, EndOfRun):
                raise channel.callback_error
    except BaseException:
        channel.abort()
        raise
    if failures:
        raise failures[0]


def _callbacks(inbox: Any) -> list[Any]:
    """Callbacks of Ray Train's controller: they send its handle, and the workers that it lost, to the inbox."""
    import ray
    from ray.train import UserCallback
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class SendHandle(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            inbox.set_controller.remote(ray.get_runtime_context().current_actor)

    class SendLosses(UserCallback):
        def __init__(self) -> None:
            self.failures = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any(isinstance(error, UserError) for error in worker_exceptions.values()):
                return  # the worker has sent it itself
            self.failures += 1
            how = {rank: how_it_ended(error) for rank, error in worker_exceptions.items()}
            details = "\n".join(f"worker {rank}: {error}" for rank, error in worker_exceptions.items())
            inbox.put.remote(WorkersLost(how=how, details=details, failure=self.failures))

    return [SendHandle(), SendLosses()]


def _worker_main(settings: Mapping[str, Any]) -> None:
    """Runs in each worker of the group."""
    import ray
    import ray.train.torch
    import torch.distributed as dist

    inbox = settings["inbox"]
    if ray.get(inbox.error.remote()) is not None:
        return  # Ray restarts the group after any error, but one that the user has to fix would only occur again
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(settings["threads"])

    def send(message: Message) -> None:
        inbox.put.remote(message)

    run, rank = settings["run"], dist.get_rank()
    inbox.join.remote(rank, ray.util.get_node_ip_address())
    heartbeat = Heartbeat(rank, run.train.stall_timeout_s, inbox.beat.remote, send)
    try:
        outcome = work(
            run, *settings["stores"], device=device, sinks=[send], on_update=send, on_samples=send, on_step=heartbeat.stepped
        )
    except UserError as error:
        ray.get(inbox.fail.remote(error))
        raise
    finally:
        heartbeat.close()
    ray.get(inbox.leave.remote(rank))
    if rank == 0:
        ray.get(inbox.finish.remote(outcome))

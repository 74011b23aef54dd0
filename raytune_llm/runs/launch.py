"""Where the workers of a run live: this process, or a group that Ray Train starts, watches and starts again. [ray]"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from raytune_llm import session
from raytune_llm.config.resources import Cluster, Local
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, ResourceError, UserError, first_line
from raytune_llm.models.quantization import check_device
from raytune_llm.report.metrics import Sink
from raytune_llm.report.news import Begin, EndOfRun, Notice, ReferencePass, SampledAnswer
from raytune_llm.report.slow import told_if_slow
from raytune_llm.runs.faults import WORKERS_LOG, Lost, Pulse, Stalled, lost_line, silent_line, stalled_line, waiting_line
from raytune_llm.runs.worker import TrainOutcome, work
from raytune_llm.runs.workspace import Workspace
from raytune_llm.train.checkpoint import complete_steps
from raytune_llm.train.strategies.base import COLLECTIVES

T = TypeVar("T")
POLL_S = 0.2
TOKENIZING_CPUS = 1
"""Are left to data.streaming, at least."""
WAITING_EVERY_S = 30.0
START_FAILURES = 3
"""After so many groups that did not come up, the run is given up."""
ABORT_S = 3.0
"""An interrupted group has so long to go by itself."""
News = Mapping[str, Any] | Begin | ReferencePass | Notice | Lost | Stalled | Sequence[SampledAnswer]
"""A record for the sinks, the beginning, what befell workers, or samples, as a list."""
Told = Begin | ReferencePass | Notice


def fit(
    run: TrainRun,
    train_store: str,
    eval_store: str | None,
    *,
    sinks: Sequence[Sink] = (),
    on_begin: Callable[[Told], None] = lambda begin: None,
    on_samples: Callable[[Sequence[SampledAnswer]], None] = lambda samples: None,
    workspace: Workspace | None = None,
) -> TrainOutcome:
    """Train where `resources` says. Every record goes to the sinks here, on the driver, as it comes. workspace: see api.train."""
    if isinstance(run.resources, Local | Cluster):
        return _fit_on_ray(run, run.resources, train_store, eval_store, sinks, on_begin, on_samples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hooks: dict[str, Any] = {"sinks": sinks, "on_begin": on_begin, "on_samples": on_samples}
    return work(run, train_store, eval_store, device=device, workspace=workspace, **hooks)


def check_devices(run: TrainRun) -> None:
    """Raises ConfigError where the run's devices are this machine's and can't do what it asks for. A cluster's workers look for
    themselves."""
    if not isinstance(run.resources, Cluster):
        check_device(run.quantization, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _fit_on_ray(
    run: TrainRun,
    resources: Local | Cluster,
    train_store: str,
    eval_store: str | None,
    sinks: Sequence[Sink],
    on_begin: Callable[[Told], None],
    on_samples: Callable[[Sequence[SampledAnswer]], None],
) -> TrainOutcome:
    session.connect(resources)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    leaving = TOKENIZING_CPUS if run.data.streaming else 0
    workers, cpus, gpus = group_size(resources, leaving_cpus=leaving)
    world = workers * run.train.micro_batch_size
    if run.train.global_batch_size % world:
        raise ConfigError(
            "train.global_batch_size",
            f"must be a multiple of train.micro_batch_size x {workers} workers = {world}",
            got=run.train.global_batch_size,
            fix=f"Set it to {-(-run.train.global_batch_size // world) * world}, or set resources.num_workers.",
        )
    check_fits(workers, cpus, gpus, leaving_cpus=leaving)
    _wait_for(workers, cpus, gpus, on_begin)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{resources.collective_timeout_s:g}"
    channel = Channel(run, resources.max_failures, sinks, on_begin, on_samples)
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={
            "run": run,
            "stores": (train_store, eval_store),
            "channel": channel.actor,
            "threads": max(1, int(cpus)),
        },
        torch_config=TorchConfig(
            backend=COLLECTIVES["cuda" if gpus else "cpu"], timeout_s=max(1, round(resources.collective_timeout_s))
        ),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        ),
        run_config=RunConfig(
            name=f"group-{os.getpid()}",
            callbacks=_callbacks(channel.actor),
            storage_path=str(Path(run.output_dir).resolve() / ".ray"),
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=START_FAILURES),
        ),
    )
    try:
        _fit(trainer, channel)
    except EndOfRun:
        raise
    except Exception as error:
        channel.close()
        raise (channel.mistake or _cause(error, channel)) from None
    channel.close()
    if channel.mistake is not None:
        raise channel.mistake
    if channel.failure is not None:
        raise channel.failure
    assert channel.outcome is not None
    return channel.outcome


def _wait_for(workers: int, cpus: float, gpus: float, tell: Callable[[Told], None]) -> None:
    """Until the cluster has a place for each: what others hold comes free some day, and Ray says nothing meanwhile."""
    import ray

    told, told_at, each = "", 0.0, {"CPU": cpus, "GPU": gpus}
    began = time.monotonic()
    while line := waiting_line(workers, each, ray.available_resources(), ray.cluster_resources()):
        now = time.monotonic()
        if now - began > 2.0 and (line != told or now - told_at > WAITING_EVERY_S):
            tell(Notice(text=line))
            told, told_at = line, now
        time.sleep(POLL_S)


def _fit(trainer: Any, channel: Channel) -> None:
    """In a thread, so that Ray takes no signals: an interrupt, or a sink's EndOfRun, ends the group also while it comes up."""
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
            if isinstance(channel.failure, EndOfRun):
                raise channel.failure
    except BaseException:
        channel.abort()
        raise
    if failures:
        raise failures[0]


def _callbacks(inbox: Any) -> list[Any]:
    """What Ray's controller, which starts and watches the group, tells: that it is there, and which workers it lost."""
    import ray
    from ray.train import UserCallback
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Controller(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            inbox.controlled_by.remote(ray.get_runtime_context().current_actor)

    class Losses(UserCallback):
        def __init__(self) -> None:
            self.failures = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any(isinstance(error, UserError) for error in worker_exceptions.values()):
                return  # which the worker has told itself
            self.failures += 1
            how = {rank: _how_it_ended(error) for rank, error in worker_exceptions.items()}
            details = "\n".join(f"worker {rank}: {error}" for rank, error in worker_exceptions.items())
            inbox.put.remote(Lost(how=how, details=details, failure=self.failures))

    return [Controller(), Losses()]


def _how_it_ended(error: Exception) -> str:
    """Of a worker, from what Ray makes of its end."""
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    error = getattr(error, "health_check_failure", error)
    text = str(error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "died (it did not answer, and was killed)"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return "died (the machine ran out of memory)"
    if isinstance(error, RayActorError):
        return "died (its node is gone)" if "node has died" in text or "node was terminated" in text else "died (killed)"
    first = (text.strip().splitlines() or [""])[0]
    if any(word in text for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")):
        return f"lost the others ({first[:120]})"
    return f"failed ({type(error).__name__}: {first[:200]})"


def _worker_main(settings: Mapping[str, Any]) -> None:
    import ray
    import ray.train.torch
    import torch.distributed as dist

    channel = settings["channel"]
    if ray.get(channel.mistake.remote()) is not None:
        return  # Ray starts a group again whatever it fell over; what the user has to fix stays as it is
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(settings["threads"])

    def tell(news: News) -> None:
        channel.put.remote(news)

    run, rank = settings["run"], dist.get_rank()
    channel.join.remote(rank, ray.util.get_node_ip_address())
    pulse = Pulse(rank, run.train.stall_timeout_s, channel.beat.remote, tell)
    try:
        outcome = work(
            run, *settings["stores"], device=device, sinks=[tell], on_begin=tell, on_samples=tell, on_step=pulse.stepped
        )
    except UserError as error:
        ray.get(channel.give_up.remote(error))
        raise
    finally:
        pulse.close()
    ray.get(channel.leave.remote(rank))
    if dist.get_rank() == 0:
        ray.get(channel.finish.remote(outcome))


class Channel:
    """News from the workers to the driver, while they come: an actor in between, and a thread here that asks it."""

    def __init__(
        self,
        run: TrainRun,
        max_failures: int,
        sinks: Sequence[Sink],
        on_begin: Callable[[Told], None],
        on_samples: Callable[[Sequence[SampledAnswer]], None],
    ) -> None:
        import ray

        class Inbox:
            def __init__(self) -> None:
                self._news: list[News] = []
                self._mistake: UserError | None = None
                self._outcome: TrainOutcome | None = None
                self._hosts: dict[int, str] = {}
                self._heard: dict[int, float] = {}
                self._controller: Any = None

            def join(self, rank: int, host: str) -> None:
                self._hosts[rank] = host
                self._heard[rank] = time.monotonic()

            def beat(self, rank: int) -> None:
                self._heard[rank] = time.monotonic()

            def leave(self, rank: int) -> None:
                self._heard.pop(rank, None)

            def controlled_by(self, controller: Any) -> None:
                self._controller = controller

            def controller(self) -> Any:
                return self._controller

            def give_up(self, mistake: UserError) -> None:
                self._mistake = self._mistake or mistake

            def mistake(self) -> UserError | None:
                return self._mistake

            def finish(self, outcome: TrainOutcome) -> None:
                self._outcome = outcome

            def put(self, news: News) -> None:
                if isinstance(news, Lost):
                    self._heard.clear()
                self._news.append(news)

            def take(self) -> tuple[list[News], UserError | None, TrainOutcome | None, dict[int, str], dict[int, float]]:
                news, self._news = self._news, []
                silent = {rank: time.monotonic() - at for rank, at in self._heard.items()}
                return news, self._mistake, self._outcome, self._hosts, silent

        self.actor: Any = ray.remote(num_cpus=0)(Inbox).remote()
        self.mistake: UserError | None = None
        self.outcome: TrainOutcome | None = None
        self.failure: Exception | None = None
        """The error of a sink. That sink gets no more records; training continues."""
        self.lost = ""
        """The line that told of the last worker that was lost."""
        self._sinks, self._on_begin, self._on_samples = sinks, on_begin, on_samples
        self._output, self._max_failures = Path(run.output_dir), max_failures
        self._stall_timeout_s = run.train.stall_timeout_s
        self._told_silent: set[int] = set()
        self._starting = ExitStack()
        self._starts()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._take()
        self._starting.close()
        import ray

        ray.kill(self.actor)

    def abort(self) -> None:
        """End the group at once, wherever it is. Another interrupt meanwhile leaves the rest to Ray, whose processes go with this
        one."""
        import ray

        self._closing.set()
        self._thread.join(ABORT_S)
        self._starting.close()
        with suppress(Exception):
            controller: Any = ray.get(self.actor.controller.remote(), timeout=ABORT_S)
            if controller is not None:
                with suppress(Exception):
                    ray.get(controller.abort.remote(), timeout=ABORT_S)
                ray.kill(controller)
        with suppress(Exception):
            ray.kill(self.actor)

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            self._take()

    def _take(self) -> None:
        import ray

        news, self.mistake, self.outcome, hosts, silent = ray.get(self.actor.take.remote())
        try:
            for item in news if self.failure is None else ():
                match item:
                    case Begin() | ReferencePass() | Notice():
                        self._starting.close()
                        self._on_begin(item)
                    case Lost():
                        self._say_lost(item, hosts)
                    case Stalled():
                        self._note(f"worker {item.rank}, {item.seconds:.0f} s after step {item.step}:\n{item.stack}")
                        self._on_begin(Notice(text=stalled_line(item, hosts, self._output / WORKERS_LOG)))
                    case list():
                        self._on_samples(item)
                    case _:
                        for sink in self._sinks:
                            sink(item)
            self._say_silent(silent, hosts)
        except Exception as failure:
            self.failure = failure  # raised in the main thread, when the workers are done

    def _starts(self) -> None:
        self._starting.enter_context(told_if_slow(self._on_begin, "starting the workers"))

    def _say_lost(self, lost: Lost, hosts: Mapping[int, str]) -> None:
        self._note(lost.details)
        step = max(complete_steps(self._output / "checkpoints"), default=None)
        log = self._output / WORKERS_LOG
        self.lost = lost_line(lost, hosts, limit=self._max_failures, resumes_from=step, log=log)
        if lost.failure <= self._max_failures:
            self._starting.close()
            self._on_begin(Notice(text=self.lost))
            self._starts()

    def _say_silent(self, silent: Mapping[int, float], hosts: Mapping[int, str]) -> None:
        frozen = {rank for rank, seconds in silent.items() if seconds > self._stall_timeout_s}
        for rank in frozen - self._told_silent:
            self._on_begin(Notice(text=silent_line(rank, silent[rank], hosts)))
        self._told_silent = frozen

    def _note(self, text: str) -> None:
        with (self._output / WORKERS_LOG).open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n\n")


def spare_cpus(run: TrainRun) -> int | None:
    """CPUs that the workers leave to tokenizing while they train; none in this process. A cluster must be connected."""
    if not isinstance(run.resources, Local | Cluster):
        return None
    import ray

    workers, cpus, _ = group_size(run.resources, leaving_cpus=TOKENIZING_CPUS)
    return max(TOKENIZING_CPUS, int(ray.cluster_resources()["CPU"] - workers * cpus))


def group_size(resources: Local | Cluster, *, leaving_cpus: int = 0) -> tuple[int, float, float]:
    """Workers, and CPUs and GPUs of each. A cluster must be connected."""
    import ray

    there = ray.cluster_resources()
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if there.get("GPU", 0) else 0.0
    workers = resources.num_workers
    if workers == "auto":
        workers = int(there["GPU"] // gpus) if gpus else 1
    cpus = resources.cpus_per_worker
    if cpus == "auto":
        cpus = 1.0
        if isinstance(resources, Local) and not gpus:
            each = (there["CPU"] - leaving_cpus) / workers
            cpus = each // 1 or (each if leaving_cpus and each else 1.0)
    return workers, float(cpus), float(gpus)


def check_fits(workers: int, cpus: float, gpus: float, *, leaving_cpus: int = 0) -> None:
    """Ray would wait for ever for what the cluster doesn't have."""
    import ray

    there = ray.cluster_resources()
    for kind, each, leaving in (("CPU", cpus, leaving_cpus), ("GPU", gpus, 0)):
        if each * workers > there.get(kind, 0.0) - leaving:
            raise ConfigError(
                "resources.num_workers",
                f"times resources.{kind.lower()}s_per_worker={each:g} must be at most "
                f"the {there.get(kind, 0.0):g} {kind}s that there are"
                + (f", less {leaving} for data.streaming" if leaving else ""),
                got=workers,
                fix="Lower one of them.",
            )


def on_a_node(resources: Cluster, work: Callable[[], T]) -> T:
    """What `work` gives, on a node of the cluster that has what a worker has. Raises what it raised there."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

    _, cpus, gpus = group_size(resources)
    try:
        return ray.get(ray.remote(num_cpus=cpus, num_gpus=gpus)(work).remote())
    except RayTaskError as error:
        raise error.cause from None
    except (OutOfMemoryError, WorkerCrashedError) as error:
        what = f"a process on a node of the cluster died ({first_line(error)})"
        raise ResourceError(what, "The same command resumes.") from error


def _cause(error: BaseException, channel: Channel) -> BaseException:
    """What a worker fell over, where Ray tells it."""
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
    from ray.train import ControllerError

    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, UserError):
            return cause
    if any(isinstance(failure, OutOfMemoryError) for failure in (error, *failures.values())):
        return ResourceError("a worker ran out of memory", "Lower train.micro_batch_size or data.max_length.")
    if isinstance(error, ControllerError):
        return ResourceError(
            f"the workers did not come up ({first_line(error.controller_failure)})",
            "Look whether the machines are busy or gone; the same command resumes.",
        )
    if " died (" in channel.lost or " lost the others (" in channel.lost:
        return ResourceError(
            channel.lost, "The same command resumes from the newest checkpoint; resources.max_failures allows more."
        )
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return ResourceError(
            f"Ray lost the run ({first_line(error)})", "The same command resumes from the newest checkpoint, once Ray is back."
        )
    return error

"""Where the workers of a run live: this process, or a group that Ray Train starts, watches and starts again. [ray]"""

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
from raytune_llm.errors import ConfigError, ResourceError, UserError
from raytune_llm.models.quantization import check_device
from raytune_llm.report.metrics import Sink
from raytune_llm.report.news import Begin, ReferencePass, SampledAnswer
from raytune_llm.runs.worker import TrainOutcome, work
from raytune_llm.train.strategies.base import COLLECTIVES

COLLECTIVE_TIMEOUT_S = 600
"""A worker that waits longer than this for the others gives up, so that a hang ends."""
POLL_S = 0.2
TOKENIZING_CPUS = 1
"""Are left to data.streaming, at least."""
News = Mapping[str, Any] | Begin | ReferencePass | Sequence[SampledAnswer]
"""A record for the sinks, the beginning, or samples, as a list."""


def fit(
    run: TrainRun,
    train_store: str,
    eval_store: str | None,
    *,
    sinks: Sequence[Sink] = (),
    on_begin: Callable[[Begin | ReferencePass], None] = lambda begin: None,
    on_samples: Callable[[Sequence[SampledAnswer]], None] = lambda samples: None,
) -> TrainOutcome:
    """Train where `resources` says. Every record goes to the sinks here, on the driver, while training goes on."""
    if isinstance(run.resources, Local | Cluster):
        return _fit_on_ray(run, run.resources, train_store, eval_store, sinks, on_begin, on_samples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return work(run, train_store, eval_store, device=device, sinks=sinks, on_begin=on_begin, on_samples=on_samples)


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
    on_begin: Callable[[Begin | ReferencePass], None],
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
            fix=f"Take {-(-run.train.global_batch_size // world) * world}, or set resources.num_workers.",
        )
    _fits(workers, cpus, gpus, leaving_cpus=leaving)
    channel = Channel(sinks, on_begin, on_samples)
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={
            "run": run,
            "stores": (train_store, eval_store),
            "channel": channel.actor,
            "threads": max(1, int(cpus)),
        },
        torch_config=TorchConfig(backend=COLLECTIVES["cuda" if gpus else "cpu"], timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        ),
        run_config=RunConfig(
            name=f"group-{os.getpid()}",
            storage_path=str(Path(run.output_dir).resolve() / ".ray"),
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=3),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        channel.close()
        raise (channel.mistake or _cause(error)) from None
    channel.close()
    if channel.mistake is not None:
        raise channel.mistake
    if channel.failure is not None:
        raise channel.failure
    assert channel.outcome is not None
    return channel.outcome


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

    try:
        outcome = work(settings["run"], *settings["stores"], device=device, sinks=[tell], on_begin=tell, on_samples=tell)
    except UserError as error:
        ray.get(channel.give_up.remote(error))
        raise
    if dist.get_rank() == 0:
        ray.get(channel.finish.remote(outcome))


class Channel:
    """News from the workers to the driver, while they come: an actor in between, and a thread here that asks it."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        on_begin: Callable[[Begin | ReferencePass], None],
        on_samples: Callable[[Sequence[SampledAnswer]], None],
    ) -> None:
        import ray

        class Inbox:
            def __init__(self) -> None:
                self._news: list[News] = []
                self._mistake: UserError | None = None
                self._outcome: TrainOutcome | None = None

            def put(self, news: News) -> None:
                self._news.append(news)

            def give_up(self, mistake: UserError) -> None:
                self._mistake = self._mistake or mistake

            def mistake(self) -> UserError | None:
                return self._mistake

            def finish(self, outcome: TrainOutcome) -> None:
                self._outcome = outcome

            def take(self) -> tuple[list[News], UserError | None, TrainOutcome | None]:
                news, self._news = self._news, []
                return news, self._mistake, self._outcome

        self.actor: Any = ray.remote(num_cpus=0)(Inbox).remote()
        self.mistake: UserError | None = None
        self.outcome: TrainOutcome | None = None
        self.failure: Exception | None = None
        """What a sink fell over. It gets no more records then; training goes on to its end."""
        self._sinks, self._on_begin, self._on_samples = sinks, on_begin, on_samples
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._take()
        import ray

        ray.kill(self.actor)

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            self._take()

    def _take(self) -> None:
        import ray

        news, self.mistake, self.outcome = ray.get(self.actor.take.remote())
        try:
            for item in news if self.failure is None else ():
                match item:
                    case Begin() | ReferencePass():
                        self._on_begin(item)
                    case list():
                        self._on_samples(item)
                    case _:
                        for sink in self._sinks:
                            sink(item)
        except Exception as failure:
            self.failure = failure  # raised in the main thread, when the workers are done


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


def _fits(workers: int, cpus: float, gpus: float, *, leaving_cpus: int) -> None:
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


def _cause(error: Exception) -> Exception:
    """What a worker fell over, where Ray tells it."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, UserError):
            return cause
    if "OutOfMemory" in str(error):
        return ResourceError("a worker ran out of memory", "Lower train.micro_batch_size or data.max_length.")
    return error

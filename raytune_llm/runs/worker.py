"""Trains a run on one worker, from token stores and config to weights. Independent of Ray: every process calls it."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raytune_llm.config.run import TrainRun
from raytune_llm.errors import Diverged
from raytune_llm.models.finite import all_finite
from raytune_llm.report.metrics import SAMPLES, JsonLines, Report, Sink
from raytune_llm.report.profile import StepProfile
from raytune_llm.report.scores import held_out_scores, write_scores
from raytune_llm.report.slow import ignore, notify_if_slow
from raytune_llm.report.updates import Notice, RunStarted, SampledAnswer, Update
from raytune_llm.runs.first_inputs import begin_from_inputs
from raytune_llm.runs.outcome import TrainOutcome
from raytune_llm.runs.output import full_disk_explained, identity, model_card, write_final
from raytune_llm.runs.remote_output import CHECKPOINTS, pull_records, push_records, push_results, work_folder
from raytune_llm.runs.samples import Sampler
from raytune_llm.runs.setup import Setup, explained, set_up
from raytune_llm.runs.workspace import Workspace
from raytune_llm.train import loop
from raytune_llm.train.checkpoint import Checkpoints
from raytune_llm.train.checkpoint_files import read_progress
from raytune_llm.train.clock import Clock
from raytune_llm.train.progress import Progress
from raytune_llm.train.remote_checkpoints import RemoteCheckpoints
from raytune_llm.train.strategies.base import Strategy, trained


def work(
    run: TrainRun,
    train_store: str,
    eval_store: str | None,
    *,
    device: torch.device,
    sinks: Sequence[Sink] = (),
    on_update: Callable[[Update], None] = lambda update: None,
    on_samples: Callable[[Sequence[SampledAnswer]], None] = lambda samples: None,
    on_step: Callable[[int], None] = lambda step: None,
    on_measured: Callable[[str, float], None] = lambda name, value: None,
    yields: Callable[[], bool] = lambda: False,
    workspace: Workspace | None = None,
) -> TrainOutcome:
    """Train from the newest checkpoint, or from the start, to the end.

    sinks, on_update, on_samples, on_measured: called on rank 0 only. on_step: called with the step's number after each step, on
    every rank. on_measured: gets figures that are not in records: `data_wait` and `checkpoint_s` (runs/ray_metrics.py).
    yields: called at log steps on every rank. True: save and end there.
    """
    began = time.perf_counter()
    notify = on_update if not dist.is_initialized() or dist.get_rank() == 0 else ignore
    with full_disk_explained(work_folder(run.output_dir)):
        setup = set_up(run, train_store, eval_store, device, on_update, workspace)
    strategy, settings, clock = setup.built.strategy, setup.loop_settings(), Clock()
    with full_disk_explained(setup.output), explained(setup.builder, "training"), ExitStack() as stack:
        checkpoints = checkpoints_of(setup, stack)
        with notify_if_slow(notify, "loading the checkpoint"):
            progress = restore(checkpoints, strategy)
        if progress.step == 0 and run.adapter.begins_from:
            with notify_if_slow(notify, f"initializing the adapter from {run.adapter.begins_from} samples"):
                begin_from_inputs(setup)
        if setup.remote is not None and setup.rank == 0:
            pull_records(setup.remote, setup.output)
        recorder = Recorder(setup, clock, checkpoints, stack, progress.step, sinks, on_samples, notify, on_measured)
        loaded = time.perf_counter()
        if setup.rank == 0:
            on_update(RunStarted(total_steps=settings.total_steps, first_step=progress.step, choices=setup.choices))
        profile = profiled(setup, settings.total_steps, progress.step, stack)

        def reserve(step: int) -> None:
            checkpoints.reserve(strategy.state)  # after a step, when the optimizer has its state

        stepped = (notified_first(setup, settings.eval_on_start, notify, stack), profile, reserve, on_step)
        yielded = False

        def yields_now() -> bool:
            nonlocal yielded
            yielded = yields()
            return yielded

        hooks = loop.Hooks(
            log=recorder.log,
            save=recorder.save,
            sample=recorder.sample,
            scores=scorer_of(setup),
            stepped=stepped,
            yields=yields_now,
        )
        strategy.model.train()
        progress = loop.run(setup.learner(), setup.source, setup.held_out, progress, settings, hooks, clock)
        trained = time.perf_counter()
        check_loss(progress)
        paused = settings.pause_step is not None and settings.pause_step <= progress.step < settings.total_steps
        if not paused and not yielded:
            finish(setup, checkpoints, progress, notify)
    strategy.close()  # a process whose run failed goes with it, at once
    times = Times(began=began, loaded=loaded, trained=trained, in_training_s=recorder.save_s)
    return train_outcome(setup, progress, clock, times, paused=paused, yielded=yielded)


def checkpoints_of(setup: Setup, stack: ExitStack) -> Checkpoints:
    """The checkpoints in the run's output folder. stack: closes them at its end."""
    checkpoint = setup.run.checkpoint
    checkpoints = Checkpoints(
        setup.output / CHECKPOINTS,
        keep=checkpoint.keep,
        keep_best=checkpoint.keeps_best,
        asynchronous=checkpoint.asynchronous,
        place=setup.remote and RemoteCheckpoints(setup.remote / CHECKPOINTS, setup.output / CHECKPOINTS),
    )
    setup.built.strategy.before_change(checkpoints.hold)
    stack.callback(checkpoints.close)
    return checkpoints


@dataclass(frozen=True, kw_only=True)
class Times:
    """When a run reached its stages, in seconds of time.perf_counter."""

    began: float
    loaded: float
    """Before its first step."""
    trained: float
    """After its last step."""
    in_training_s: float
    """Seconds in between that were spent waiting for checkpoints."""


def train_outcome(
    setup: Setup, progress: Progress, clock: Clock, times: Times, *, paused: bool, yielded: bool = False
) -> TrainOutcome:
    """The result of a run that ends now."""
    rate = clock.rate()
    return TrainOutcome(
        progress=progress,
        world_size=setup.world,
        tokens_per_s=None if rate is None else rate.tokens,
        mfu=setup.mfu(rate),
        peak_memory_gib=memory_gib(setup.device),
        load_s=times.loaded - times.began,
        train_s=times.trained - times.loaded - times.in_training_s,
        save_s=times.in_training_s + time.perf_counter() - times.trained,
        paused=paused,
        yielded=yielded,
    )


class Recorder:
    """Writes the files of a run while it trains: all ranks together write checkpoints, rank 0 writes records and samples."""

    def __init__(
        self,
        setup: Setup,
        clock: Clock,
        checkpoints: Checkpoints,
        stack: ExitStack,
        from_step: int,
        sinks: Sequence[Sink],
        on_samples: Callable[[Sequence[SampledAnswer]], None],
        notify: Callable[[Notice], None],
        on_measured: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        """stack: closes the files at its end. from_step: the step that the files are continued from."""
        self.save_s = 0.0
        """Seconds that training waited for checkpoints."""
        self._setup, self._clock, self._checkpoints, self._on_samples = setup, clock, checkpoints, on_samples
        self._notify, self._on_measured = notify, on_measured
        self._identity = identity(setup.run, setup.stores.manifests)
        self._sampler = sampler_of(setup)
        self._report = self._samples = None
        if setup.rank == 0:
            self._report = stack.enter_context(Report(setup.output, from_step=from_step, sinks=sinks))
        if setup.rank == 0 and self._sampler is not None:
            self._samples = stack.enter_context(JsonLines(setup.output / SAMPLES, from_step=from_step))

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a record. Training records also get memory_gib and mfu."""
        if self._report is None:
            return
        machine: dict[str, Any] = {}
        if "loss" in record:
            machine["memory_gib"] = round(memory_gib(self._setup.device), 3)
            mfu = self._setup.mfu(self._clock.latest)
            machine["mfu"] = None if mfu is None else round(mfu, 4)
            self._on_measured("data_wait", self._clock.data_wait)
        self._report.log({**record, **machine})

    def save(self, progress: Progress) -> None:
        at = time.perf_counter()
        with notify_if_slow(self._notify, f"saving the checkpoint at step {progress.step}"):
            if self._setup.remote is not None and self._setup.rank == 0:
                push_records(self._setup.remote, self._setup.output)
            self._checkpoints.save(self._setup.built.strategy.state(), progress, self._identity)
        waited = time.perf_counter() - at
        self.save_s += waited
        if self._setup.rank == 0:
            self._on_measured("checkpoint_s", waited)

    def sample(self, step: int) -> None:
        samples = [] if self._sampler is None else self._sampler(step)
        if self._samples is not None:
            for sample in samples:
                self._samples.write(sample.to_json())
            self._on_samples(samples)


def sampler_of(setup: Setup) -> Sampler | None:
    """A sampler of the first train.sample_rows rows of each held-out source. None: no samples are wanted."""
    train, stores = setup.run.train, setup.stores
    if not train.sample_rows or stores.evaluated is None:
        return None
    return Sampler(
        setup.built.strategy,
        setup.tokenizer,
        stores.evaluated,
        [row for samples in stores.held_out.values() for row in samples.rows[: train.sample_rows].tolist()],
        max_new_tokens=train.max_new_tokens,
        stop_ids=setup.stop_ids,
        device=setup.device,
    )


def scorer_of(setup: Setup) -> Callable[[], Mapping[str, float]]:
    """Scores of train.eval_tasks at an evaluation; none if there are no tasks."""
    train = setup.run.train
    if not train.eval_tasks:
        return dict
    from raytune_llm.runs.task_scores import TaskScorer  # lm-eval: seconds to import

    return TaskScorer(
        setup.built.strategy,
        setup.tokenizer,
        train.eval_tasks,
        max_questions=train.eval_task_questions,
        stop_ids=setup.stop_ids,
        device=setup.device,
    )


def notified_first(setup: Setup, evaluates: bool, notify: Callable[[Notice], None], stack: ExitStack) -> Callable[[int], None]:
    """Notify if the first step is slow. Returns a function to call after each step, which ends the wait for the first one."""
    compiled = ", layers are compiled" if setup.built.policy.compiled else ""
    evaluated = "an evaluation and " if evaluates else ""
    first = stack.enter_context(ExitStack())
    first.enter_context(notify_if_slow(notify, f"{evaluated}the first step{compiled}"))
    return lambda step: first.close()


def profiled(setup: Setup, total_steps: int, first_step: int, stack: ExitStack) -> Callable[[int], None]:
    """A function to call after each step, which profiles rank 0 if train.profile is set."""
    if not setup.run.train.profile or setup.rank != 0:
        return lambda step: None
    thin = 4 * setup.built.policy.adapters.max_rank  # fused projections, such as q, k and v, have several times the rank
    profile = StepProfile(setup.output, setup.device, first_step=first_step, total_steps=total_steps, thin=thin)
    stack.callback(profile.close)
    return profile.stepped


def finish(setup: Setup, checkpoints: Checkpoints, progress: Progress, notify: Callable[[Notice], None]) -> None:
    """Write `final/`, and a reward model's scores of the held-out pairs. A collective call."""
    run, strategy, policy = setup.run, setup.built.strategy, setup.built.policy
    best = progress.best_step if run.checkpoint.keeps_best else None
    if best is not None and best != progress.step:
        with notify_if_slow(notify, "writing the last checkpoint"):
            checkpoints.wait()
        checkpoints.load(best, strategy.load)
    if setup.stage.scores is not None and setup.held_out:
        with strategy.averaged():
            pairs = held_out_scores(strategy.model, setup.stage.scores, setup.held_out, setup.device)
        if setup.rank == 0:
            write_scores(pairs, setup.output)
    with notify_if_slow(notify, "gathering what was trained") as gathering:
        whole = run.adapter.trains_base
        total, parameters = len(trained(policy, frozen=whole)), {}
        for number, (name, value) in enumerate(strategy.full_parameters(frozen=whole), start=1):
            gathering.of(number, total)
            if setup.rank == 0:
                parameters[name] = value
    check_weights(parameters, progress.step)
    if setup.rank == 0:
        save = partial(
            policy.save,
            parameters=parameters,
            tokenizer=setup.tokenizer,
            stop_ids=setup.stop_ids,
            base_model=run.model.base_name,
            adapter=setup.built.adapter,
        )
        with notify_if_slow(notify, "writing final/"):
            write_final(setup.output / "final", save, model_card(run, progress.step, progress.loss_last))
        if setup.remote is not None:
            with notify_if_slow(notify, f"uploading final/ to {setup.remote.address}"):
                push_results(setup.remote, setup.output)
    if dist.is_initialized():
        dist.barrier()


def check_loss(progress: Progress) -> None:
    """Raises Diverged if the last loss is NaN or infinite, since the model is then unusable."""
    if progress.loss_last is not None and not math.isfinite(progress.loss_last):
        raise Diverged(
            f"the loss at step {progress.step} is {progress.loss_last}: the model is unusable, so final/ is not written",
            loop.CALMER,
        )


def check_weights(parameters: Mapping[str, Tensor], step: int) -> None:
    """Raises Diverged on every worker if a weight of rank 0 is NaN or infinite. The last loss does not tell, since an update
    follows it."""
    broken = [name for name, value in parameters.items() if value.is_floating_point() and not all_finite(value)][:1]
    if dist.is_initialized():
        dist.broadcast_object_list(told := [broken], src=0)
        [broken] = told
    if broken:
        what = f"{broken[0]} has values that are no numbers after step {step}"
        raise Diverged(f"{what}: the model is unusable, so final/ is not written", loop.CALMER)


def restore(checkpoints: Checkpoints, strategy: Strategy) -> Progress:
    """Load the newest complete and undamaged checkpoint, if there is one."""
    step = checkpoints.newest()
    if step is None:
        return Progress()
    progress, _ = read_progress(checkpoints.folder, step)
    checkpoints.load(step, strategy.load)
    return progress


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU, or of the host if there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""The training loop. One optimizer step is `one_step`; everything around it decides when to log, evaluate, save and stop.

The host waits for the device only at log steps. The divisor of a step's loss is known from the data, or is summed over workers on
the device, and AdamW itself skips a step whose gradient is not finite. With another optimizer, or with ZeRO, the host waits once
per step for the gradient's norm, to know whether to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raytune_llm.data.batches import to_device
from raytune_llm.data.loader import Loader
from raytune_llm.data.steps import Step, StepSource
from raytune_llm.errors import ConfigError, Diverged
from raytune_llm.records import Batch
from raytune_llm.stages import Objective
from raytune_llm.train.clock import Clock
from raytune_llm.train.dropout import seed_dropout
from raytune_llm.train.enrichers import Enricher, enriched
from raytune_llm.train.phases import phase
from raytune_llm.train.progress import Progress
from raytune_llm.train.strategies.base import StepOut, Strategy
from raytune_llm.train.window import Window, added, means

CALMER = "Lower optimizer.lr, lengthen schedule.warmup_ratio, or set train.precision=bf16 or fp32."


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Everything that computes a step: the model under its strategy, the objective, and the enrichers of its batches."""

    strategy: Strategy
    objective: Objective
    device: torch.device
    enrichers: Sequence[Enricher] = ()
    """They run in this order; each sees what the previous ones added."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """When to log, evaluate, save and stop, in steps."""

    total_steps: int
    learning_rate: Callable[[int], float]
    """The learning rate of a step, by its number from 0."""
    log_every: int
    eval_every: int | None
    """None: at the end of each epoch."""
    eval_steps: frozenset[int] | None
    """Evaluate after these steps and the last one, instead of eval_every."""
    eval_on_start: bool
    """Evaluate before the first step too."""
    save_every: int | None
    """None: at the end of each epoch."""
    save_best: bool
    """Also save after each evaluation with the lowest loss so far."""
    early_stopping: int | None
    """End after this many evaluations without a better stop_metric."""
    max_nonfinite_steps: int
    seed: int
    stop_metric: str = "eval_loss"
    """A metric of evaluations, for early stopping."""
    stop_sign: int = 1
    """1 if lower is better, -1 if higher is."""
    pause_step: int | None = None
    """End after this step, with an evaluation and a checkpoint."""

    def evaluates(self, step: int, epoch_ends: bool) -> bool:
        return due(step, self.eval_every, epoch_ends) if self.eval_steps is None else step in self.eval_steps


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Callbacks. All workers call them together."""

    log: Callable[[Mapping[str, Any]], None]
    save: Callable[[Progress], None]
    sample: Callable[[int], None]
    """Called at each evaluation, with the step."""
    scores: Callable[[], Mapping[str, float]] = dict
    """Gives more metrics of an evaluation, by name."""
    stepped: Sequence[Callable[[int], None]] = ()
    """Called after each step, with its number."""
    yields: Callable[[], bool] = lambda: False
    """Called at log steps. True: save and end here, so that another group of workers can resume."""


def run(
    learner: Learner,
    source: StepSource,
    held_out: Mapping[str, Loader],
    progress: Progress,
    settings: LoopSettings,
    hooks: Hooks,
    clock: Clock,
) -> Progress:
    """Train from `progress` to the last step, or to an early stop, a pause or a yield before it. Returns the final progress.

    held_out: data source -> its held-out samples.
    """
    window = Window(learner.device, progress.window)
    resume(learner.enrichers, progress)
    clock.start()
    if progress.step >= (settings.pause_step or settings.total_steps):
        return progress
    if settings.eval_on_start and held_out and progress.step == 0:
        with clock.stopped():
            hooks.log({"step": 0, **evaluation(learner, held_out, seed=settings.seed), **hooks.scores()})
            hooks.sample(0)
    with closing(source.steps(progress, learner.strategy.model)) as steps:
        for step in clock.awaited(steps):
            lr = settings.learning_rate(progress.step)
            one_step(learner, step, window, lr=lr, seed=settings.seed + progress.step)
            advance(progress, step)
            clock.stepped(step.tokens, learner.strategy.world * sum(batch.attention_pairs for batch in step.batches))
            for stepped in hooks.stepped:
                stepped(progress.step)
            last, paused = progress.step == settings.total_steps, progress.step == settings.pause_step

            logs = last or progress.step == 1 or progress.step % settings.log_every == 0
            if logs:
                log_step(progress, learner.objective, window, clock, settings, hooks, epoch=step.epoch + step.fraction, lr=lr)
            stopped = False
            if held_out and (last or paused or settings.evaluates(progress.step, step.ends_epoch)):
                with clock.stopped():
                    stopped = evaluate(learner, held_out, progress, settings, hooks)
                    hooks.sample(progress.step)
            best = settings.save_best and progress.best_step == progress.step
            ends = last or paused or stopped or (logs and hooks.yields())
            if ends or best or due(progress.step, settings.save_every, step.ends_epoch):
                with clock.stopped():
                    save(progress, window, source, learner.enrichers, hooks)
            if ends:
                break
    return progress


def resume(enrichers: Sequence[Enricher], progress: Progress) -> None:
    """Enrichers resume from their state in the checkpoint, if there is one."""
    if progress.step:
        for enricher, state in zip(enrichers, progress.enricher_states, strict=True):
            enricher.load(state)


def advance(progress: Progress, step: Step) -> None:
    progress.step += 1
    progress.epoch, progress.cursor = step.epoch, step.cursor
    progress.tokens_seen += step.tokens


def save(progress: Progress, window: Window, source: StepSource, enrichers: Sequence[Enricher], hooks: Hooks) -> None:
    progress.window = window.read()
    progress.source_state = source.state()
    progress.enricher_states = [enricher.state() for enricher in enrichers]
    hooks.save(replace(progress))


def one_step(learner: Learner, step: Step, window: Window, *, lr: float, seed: int) -> None:
    """Forward and backward over this worker's micro-batches, then one update with the gradient of the whole global batch."""
    strategy = learner.strategy
    batches, count = ready(learner, step, seed=seed), count_of(step, learner.device)
    for number, batch in enumerate(batches):
        seed_dropout(batch)
        last = number == len(batches) - 1
        with strategy.accumulate(last=last):
            with phase("forward pass"):
                out = learner.objective.loss(strategy.model, batch)
            with phase("backward pass"):
                strategy.backward(out.total / count, lr)
        window.add_loss(out)
    with phase("optimizer step"):
        done = strategy.step(lr)
    add_step(window, done, strategy.world)


def add_step(window: Window, done: StepOut, world: int) -> None:
    # All workers have the same values, and the window sums over workers.
    share = 1.0 / world
    window.add("grad_norm", torch.where(done.skipped, 0.0, done.grad_norm) * share, (~done.skipped) * share)
    window.add("nonfinite", done.skipped * share, share)


def log_step(
    progress: Progress,
    objective: Objective,
    window: Window,
    clock: Clock,
    settings: LoopSettings,
    hooks: Hooks,
    *,
    epoch: float,
    lr: float,
) -> None:
    """Log the means since the last log step. Reading them waits for the device."""
    sums = window.read()
    window.clear()
    values = reported(objective, sums)
    values.pop("nonfinite")
    progress.nonfinite_steps += round(sums["nonfinite"][0])
    loss = values.pop("loss", math.nan)
    progress.loss_first = loss if progress.loss_first is None else progress.loss_first
    progress.loss_last = loss
    record = {
        "step": progress.step,
        "epoch": round(epoch, 6),
        "loss": loss,
        "lr": lr,
        "grad_norm": values.pop("grad_norm", math.nan),
        "tokens_seen": progress.tokens_seen,
        "tokens_per_s": clock.read().tokens,
        **values,
    }
    if progress.nonfinite_steps:
        record["nonfinite_steps"] = progress.nonfinite_steps
    hooks.log(record)
    if progress.nonfinite_steps > settings.max_nonfinite_steps:
        raise Diverged(
            f"{progress.nonfinite_steps} steps up to step {progress.step} had a nonfinite gradient, "
            f"more than train.max_nonfinite_steps={settings.max_nonfinite_steps}",
            CALMER,
        )


def evaluate(learner: Learner, held_out: Mapping[str, Loader], progress: Progress, settings: LoopSettings, hooks: Hooks) -> bool:
    """Log an evaluation and remember the lowest loss. Returns True if the run should stop early."""
    return log_evaluation({**evaluation(learner, held_out, seed=settings.seed), **hooks.scores()}, progress, settings, hooks)


def log_evaluation(record: Mapping[str, float], progress: Progress, settings: LoopSettings, hooks: Hooks) -> bool:
    """Log the metrics of an evaluation, and remember the lowest loss and the best stop_metric. Returns True if the run should
    stop early."""
    eval_loss = record["eval_loss"]
    hooks.log({"step": progress.step, **record})
    if progress.best_loss is None or eval_loss < progress.best_loss:
        progress.best_loss, progress.best_step = eval_loss, progress.step
    if settings.stop_metric not in record:
        there = ", ".join(record)
        rule = "must be a metric that evaluations report"
        raise ConfigError("train.early_stopping_metric", rule, got=settings.stop_metric, fix=f"There are: {there}.")
    score = settings.stop_sign * record[settings.stop_metric]
    if progress.best_score is None or score < progress.best_score:
        progress.best_score, progress.evals_without_gain = score, 0
    else:
        progress.evals_without_gain += 1
    return settings.early_stopping is not None and progress.evals_without_gain >= settings.early_stopping


def evaluation(learner: Learner, held_out: Mapping[str, Loader], *, seed: int) -> dict[str, float]:
    """Loss and metrics over all held-out rows, as eval_loss and so on. With several sources, each also has its own
    (eval_<source>_loss)."""
    model, objective = learner.strategy.model, learner.objective
    model.eval()
    with learner.strategy.averaged():
        sources = {name: held_out_sums(learner, loader, seed=seed) for name, loader in held_out.items()}
    model.train()
    return evaluated(objective, sources)


def evaluated(objective: Objective, sources: Mapping[str, Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """The record of an evaluation, from sums and counts by source."""
    record = {f"eval_{name}": value for name, value in reported(objective, added(sources.values())).items()}
    if len(sources) > 1:
        for source, sums in sources.items():
            record |= {f"eval_{source}_{name}": value for name, value in reported(objective, sums).items()}
    return record


@torch.no_grad()
def held_out_sums(learner: Learner, loader: Loader, *, seed: int) -> dict[str, tuple[float, float]]:
    """(sum, count) of loss and metrics over the loader's samples and all workers."""
    window = Window(learner.device, {})
    for step in loader.epoch(0):
        for batch in ready(learner, replace(step, held_out=True), seed=seed):
            with phase("evaluation"):
                out = learner.objective.loss(learner.strategy.model, batch)
            window.add_loss(out)
    return window.read()


def reported(objective: Objective, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    values = means(sums)
    return {**values, **objective.derived(values)} if "loss" in values else values


def due(step: int, every: int | None, epoch_ends: bool) -> bool:
    return epoch_ends if every is None else step % every == 0


def ready(learner: Learner, step: Step, *, seed: int) -> list[Batch]:
    """This worker's micro-batches on the device, with the columns of all enrichers."""
    return completed(learner, step, [to_device(batch, learner.device) for batch in step.batches], seed=seed)


def completed(learner: Learner, step: Step, batches: Sequence[Batch], *, seed: int) -> list[Batch]:
    """The step's micro-batches (on the device) with the columns of all enrichers."""
    return enriched(learner.enrichers, learner.strategy.model, [replace(batch, seed=seed) for batch in batches], step)


def count_of(step: Step, device: torch.device) -> float | Tensor:
    """The divisor of the step's loss. If the step does not know it, it is summed over the batches of all workers (collective)."""
    if step.count is not None:
        return step.count or 1
    count = torch.full((), sum(batch.count for batch in step.batches), dtype=torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(count)
    return torch.where(count == 0, 1.0, count)

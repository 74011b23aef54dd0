"""The training loop. One optimizer step is `one_step`; everything around it decides when to log, evaluate, save and stop.

Nothing in a step waits for the device except at log steps: the number that a step's loss is divided by is known from the data,
and with AdamW a step whose gradient is not finite skips itself on the device. With another optimizer, and with ZeRO, the host
waits once a step for the gradient's norm, to know whether to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from raytune_llm.data.batches import to_device
from raytune_llm.data.loader import Loader, Step
from raytune_llm.errors import ResourceError
from raytune_llm.records import Batch
from raytune_llm.stages import Objective
from raytune_llm.train.checkpoint import Progress
from raytune_llm.train.clock import Clock
from raytune_llm.train.coupling import Coupled, seed_dropout
from raytune_llm.train.phases import phase
from raytune_llm.train.reference import Online
from raytune_llm.train.strategies.base import Strategy
from raytune_llm.train.window import Window, added, means


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What computes a step: the model under its strategy, the objective, and what the objective is to know beside the batch."""

    strategy: Strategy
    objective: Objective
    device: torch.device
    reference: Online | None = None
    """None where batches come with the reference's log-probabilities, or need none."""
    coupled: Coupled | None = None
    """None where the loss needs to know nothing of the whole global batch."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is due when, in steps."""

    total_steps: int
    learning_rate: Callable[[int], float]
    """Of the step with this number, from 0."""
    log_every: int
    eval_every: int | None
    """None: at each epoch's end."""
    save_every: int | None
    """None: at each epoch's end."""
    save_best: bool
    """Save as well after each evaluation with the lowest loss so far."""
    early_stopping: int | None
    max_nonfinite_steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens then. All workers call them together."""

    log: Callable[[Mapping[str, Any]], None]
    save: Callable[[Progress], None]
    sample: Callable[[int], None]
    """At each evaluation, with the step."""
    stepped: Sequence[Callable[[int], None]] = ()
    """After each step, with its number."""


def run(
    learner: Learner,
    loader: Loader,
    eval_loaders: Mapping[str, Loader],
    progress: Progress,
    plan: Plan,
    hooks: Hooks,
    clock: Clock,
) -> Progress:
    """Train from `progress` to the plan's end (or an early stop) and return where it stands then."""
    window = Window(learner.device, progress.window)
    clock.start()
    stopped = False
    while progress.step < plan.total_steps and not stopped:
        with closing(loader.steps(progress.epoch, progress.cursor)) as steps:
            for step in steps:
                lr = plan.learning_rate(progress.step)
                one_step(learner, step, window, lr=lr, seed=plan.seed + progress.step)
                progress.step += 1
                progress.cursor = step.cursor
                progress.tokens_seen += step.tokens
                clock.stepped(step.tokens, learner.strategy.world * sum(batch.attention_pairs for batch in step.batches))
                for stepped in hooks.stepped:
                    stepped(progress.step)
                last = progress.step == plan.total_steps
                epoch_ends = step.fraction == 1.0

                if last or progress.step == 1 or progress.step % plan.log_every == 0:
                    log_step(progress, learner.objective, window, clock, plan, hooks, epoch=progress.epoch + step.fraction, lr=lr)
                if eval_loaders and (last or due(progress.step, plan.eval_every, epoch_ends)):
                    with clock.stopped():
                        stopped = evaluate(learner, eval_loaders, progress, plan, hooks)
                        hooks.sample(progress.step)
                best = plan.save_best and progress.best_step == progress.step
                if last or stopped or best or due(progress.step, plan.save_every, epoch_ends):
                    with clock.stopped():
                        progress.window = window.read()
                        progress.stage_state = None if learner.coupled is None else learner.coupled.remembered()
                        hooks.save(replace(progress))
                if last or stopped:
                    return progress
        progress.epoch, progress.cursor = progress.epoch + 1, 0
    return progress


def one_step(learner: Learner, step: Step, window: Window, *, lr: float, seed: int) -> None:
    """Forward and backward over this worker's micro-batches, then one update with the gradient of the whole global batch."""
    strategy = learner.strategy
    batches = ready(learner, step, seed=seed, remember=True)
    for number, batch in enumerate(batches):
        seed_dropout(seed, batch.sample_ids)
        last = number == len(batches) - 1
        with strategy.accumulate(last=last):
            with phase("forward pass"):
                out = learner.objective.loss(strategy.model, batch)
            with phase("backward pass"):
                strategy.backward(out.total / (step.count or 1))
        window.add_loss(out)
    with phase("optimizer step"):
        done = strategy.step(lr)
    # The same on all workers: only one of them counts it.
    share = 1.0 / strategy.world
    window.add("grad_norm", torch.where(done.skipped, 0.0, done.grad_norm) * share, (~done.skipped) * share)
    window.add("nonfinite", done.skipped * share, share)


def log_step(
    progress: Progress,
    objective: Objective,
    window: Window,
    clock: Clock,
    plan: Plan,
    hooks: Hooks,
    *,
    epoch: float,
    lr: float,
) -> None:
    """The only place where a step waits for the device."""
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
    if progress.nonfinite_steps > plan.max_nonfinite_steps:
        raise ResourceError(
            f"{progress.nonfinite_steps} steps up to step {progress.step} had a gradient that is not finite, "
            f"more than train.max_nonfinite_steps={plan.max_nonfinite_steps}",
            "Lower optimizer.lr, lengthen schedule.warmup_ratio, or set train.precision=bf16 or fp32.",
        )


def evaluate(learner: Learner, loaders: Mapping[str, Loader], progress: Progress, plan: Plan, hooks: Hooks) -> bool:
    """Loss and metrics over what is held out, as eval_loss and so on. True where the run is to stop early.

    Where there are several sources, each has its own too (eval_<source>_loss); those of the whole are over all their tokens.
    """
    model, objective = learner.strategy.model, learner.objective
    model.eval()
    sources = {name: held_out_sums(learner, loader, seed=plan.seed) for name, loader in loaders.items()}
    model.train()
    values = reported(objective, added(sources.values()))
    eval_loss = values["loss"]
    record = {f"eval_{name}": value for name, value in values.items()}
    if len(sources) > 1:
        for source, sums in sources.items():
            record |= {f"eval_{source}_{name}": value for name, value in reported(objective, sums).items()}
    hooks.log({"step": progress.step, **record})
    if progress.best_loss is None or eval_loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.evals_without_gain = eval_loss, progress.step, 0
    else:
        progress.evals_without_gain += 1
    return plan.early_stopping is not None and progress.evals_without_gain >= plan.early_stopping


@torch.no_grad()
def held_out_sums(learner: Learner, loader: Loader, *, seed: int) -> dict[str, tuple[float, float]]:
    """(sum, count) of loss and metrics over the loader's samples and all workers."""
    window = Window(learner.device, {})
    for step in loader.steps(0):
        for batch in ready(learner, step, seed=seed, remember=False):
            with phase("evaluation"):
                out = learner.objective.loss(learner.strategy.model, batch)
            window.add_loss(out)
    return window.read()


def reported(objective: Objective, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    values = means(sums)
    return {**values, **objective.derived(values)} if "loss" in values else values


def due(step: int, every: int | None, epoch_ends: bool) -> bool:
    return epoch_ends if every is None else step % every == 0


def ready(learner: Learner, step: Step, *, seed: int, remember: bool) -> list[Batch]:
    """This worker's micro-batches on the device, with what the loss is to know of the reference and of the whole global batch."""
    batches = [to_device(replace(batch, seed=seed), learner.device) for batch in step.batches]
    if learner.reference is not None:
        with phase("reference"):
            batches = [learner.reference.attach(batch) for batch in batches]
    if learner.coupled is None:
        return batches
    with phase("first pass over the global batch"):
        return learner.coupled.attach(learner.strategy.model, batches, step, seed=seed, remember=remember)

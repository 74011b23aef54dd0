"""Sets up a run on one worker before its first step: the data, the model, and the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from raytune_llm.config.run import TrainRun
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.loader import Loader
from raytune_llm.data.samples import Samples
from raytune_llm.data.tokens.tokenizer import first_pieces, stop_ids
from raytune_llm.memory.flops import peak_flops
from raytune_llm.models.attention.isolation import needs_lines
from raytune_llm.models.build import run_config
from raytune_llm.models.load import model_class
from raytune_llm.object_store import RemoteFolder
from raytune_llm.report.slow import ignore, notify_if_slow
from raytune_llm.report.updates import ReferencePass, Update
from raytune_llm.runs.build import Builder, Built
from raytune_llm.runs.reference import find_reference
from raytune_llm.runs.remote_output import remote_folder, work_folder
from raytune_llm.runs.stores import Stores, open_stores, shares_prompts, total_steps
from raytune_llm.runs.workspace import Workspace
from raytune_llm.stages import STAGES, Objective, Stage
from raytune_llm.train import loop
from raytune_llm.train.clock import Rate
from raytune_llm.train.enrichers import Enricher
from raytune_llm.train.enrichers.global_statistics import FirstPass
from raytune_llm.train.schedules import learning_rate


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run on this worker, before it resumes from a checkpoint."""

    run: TrainRun
    device: torch.device
    rank: int
    world: int
    stage: Stage
    objective: Objective
    tokenizer: Any
    stop_ids: Sequence[int]
    config: PretrainedConfig
    stores: Stores
    builder: Builder
    built: Built
    enrichers: Sequence[Enricher]
    source: Loader
    held_out: Mapping[str, Loader]
    """Data source -> its held-out samples."""
    choices: tuple[str, ...]
    """Automatic choices and their reasons, one line each."""

    @property
    def output(self) -> Path:
        return work_folder(self.run.output_dir)

    @cached_property
    def remote(self) -> RemoteFolder | None:
        """The output folder in an object store, of which `output` is then this machine's copy; None if it is on a file system."""
        return remote_folder(self.run.output_dir)

    def learner(self) -> loop.Learner:
        return loop.Learner(strategy=self.built.strategy, objective=self.objective, device=self.device, enrichers=self.enrichers)

    def loop_settings(self) -> loop.LoopSettings:
        run = self.run
        steps = total_steps(run, self.source.steps_per_epoch)
        return loop.LoopSettings(
            total_steps=steps,
            pause_step=None if run.train.pause_at is None else steps_at(run.train.pause_at, steps),
            learning_rate=learning_rate(run.schedule, peak=run.optimizer.lr, total=steps),
            log_every=run.train.log_every_steps,
            eval_every=run.train.eval_every_steps,
            eval_steps=None if run.train.eval_at is None else frozenset(steps_at(part, steps) for part in run.train.eval_at),
            eval_on_start=run.train.eval_on_start,
            save_every=run.checkpoint.every_steps,
            save_best=run.checkpoint.keeps_best,
            early_stopping=run.train.early_stopping,
            stop_metric=run.train.early_stopping_metric,
            stop_sign=1 if run.train.early_stopping_mode == "min" else -1,
            max_nonfinite_steps=run.train.max_nonfinite_steps,
            seed=run.train.seed if run.train.adapter_seed is None else run.train.adapter_seed,
        )

    def mfu(self, rate: Rate | None) -> float | None:
        """Model FLOPs utilization (0 to 1), relative to the GPU's bf16 peak by its maker. None if the peak or the rate is
        unknown."""
        peak = peak_flops(self.device)
        return None if peak is None or rate is None else self.built.operations.of(*rate) / (peak * self.world)


@dataclass(frozen=True, kw_only=True)
class Reads:
    """The data and tokenizer of a run. Runs that train on the same packs in one pass share it."""

    tokenizer: Any
    stop_ids: Sequence[int]
    config: PretrainedConfig
    stores: Stores
    shares_prompts: bool
    first_pieces: Mapping[int, Sequence[int]]
    """For each token that the run adds: see Builder."""

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0


def reads_of(run: TrainRun, train_store: str, eval_store: str | None, workspace: Workspace) -> Reads:
    tokenizer, template = workspace.tokenizer_of(run)
    config = run_config(run.model, tokenizer, run.data.max_length, packing=run.data.packing)
    shares = shares_prompts(run, run.stage.kind, lambda: config)
    in_lines = needs_lines(config, model_class(config))
    stores = open_stores(run, train_store, eval_store, share_prompts=shares, in_lines=in_lines)
    return Reads(
        tokenizer=tokenizer,
        stop_ids=stop_ids(tokenizer, template),
        config=config,
        stores=stores,
        shares_prompts=shares,
        first_pieces=first_pieces(run.model, tokenizer),
    )


def set_up(
    run: TrainRun,
    train_store: str,
    eval_store: str | None,
    device: torch.device,
    on_update: Callable[[Update], None],
    workspace: Workspace | None = None,
) -> Setup:
    """The data, the model, and the reference."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    workspace = workspace or Workspace()
    reads = reads_of(run, train_store, eval_store, workspace)
    builder = Builder(run, reads.config, device, reads.first_pieces, workspace.base)
    with explained(builder, "loading the model"), notify_if_slow(on_update if rank == 0 else ignore, "loading the model"):
        built = builder.build()
    return complete(run, reads, builder, built, on_update)


def complete(run: TrainRun, reads: Reads, builder: Builder, built: Built, on_update: Callable[[Update], None]) -> Setup:
    """The setup of a run whose model is built: adds its reference, learner and sources of steps."""
    stage, stores = STAGES[run.stage.name], reads.stores
    objective = stage.objective(run.stage)
    enrichers, enricher_choices = _enrichers(run, objective, reads, builder, built, on_update)
    loader = partial(
        Loader,
        micro_batch_size=run.train.micro_batch_size,
        global_batch_size=run.train.global_batch_size,
        rank=builder.rank,
        world_size=builder.world,
        seed=run.train.seed,
        pad_id=reads.pad_id,
    )
    setup = Setup(
        run=run,
        device=builder.device,
        rank=builder.rank,
        world=builder.world,
        stage=stage,
        objective=objective,
        tokenizer=reads.tokenizer,
        stop_ids=reads.stop_ids,
        config=reads.config,
        stores=stores,
        builder=builder,
        built=built,
        enrichers=enrichers,
        source=loader(stores.train, shuffle=True),
        held_out={source: loader(samples, shuffle=False) for source, samples in stores.held_out.items()},
        choices=(*built.choices, *enricher_choices, *_data_choices(run, reads)),
    )
    return replace(setup, choices=(*setup.choices, *_schedule_choices(setup.loop_settings())))


def _enrichers(
    run: TrainRun,
    objective: Objective,
    reads: Reads,
    builder: Builder,
    built: Built,
    on_update: Callable[[Update], None],
) -> tuple[Sequence[Enricher], tuple[str, ...]]:
    """The enrichers of a run in order, and the automatic choices about them. A collective call; it may take long, since it
    computes a reference's log-probabilities for all rows."""
    enrichers, choices = [], ()
    if objective.reference is not None:
        with explained(builder, "the pass of the reference"):
            reference = find_reference(
                run,
                objective.reference,
                built.strategy,
                reads.stores,
                reads.config,
                first_pieces=reads.first_pieces,
                device=builder.device,
                compute=built.policy.compute,
                pad_id=reads.pad_id,
                on_rows=lambda done, total: on_update(ReferencePass(done=done, total=total)) if builder.rank == 0 else None,
            )
        choices = reference.choices
        enrichers.append(reference.enricher)
    if objective.statistics is not None:
        enrichers.append(FirstPass(objective.statistics))  # after the reference, which it may read
    return enrichers, choices


def _data_choices(run: TrainRun, reads: Reads) -> Iterator[str]:
    """Automatic choices about the rows, as lines of text for the user."""
    kind, stores = KINDS[run.stage.kind], reads.stores
    if kind.can_share_prompts:
        yield f"prompts: {'shared by both answers' if reads.shares_prompts else 'one copy an answer'}"
    if isinstance(stores.train, Samples):
        yield from kind.remarks(stores.train.store)
    if run.data.evaluates and not stores.held_out:
        yield f"evaluation: none, since data.eval_fraction={run.data.eval_fraction} of these rows is no row"


def _schedule_choices(settings: loop.LoopSettings) -> Iterator[str]:
    if settings.total_steps == 1 and settings.learning_rate(0) == 0:
        yield "learning rate: 0 in the only step, which is the warm-up: nothing is learned (schedule.warmup_ratio=0 has none)"


def steps_at(part: float, steps: int) -> int:
    """The step at a fraction of all steps, rounded up, but not for floating-point errors: 0.1 x 3 of 60 steps is 18."""
    return max(1, math.ceil(part * steps - 1e-6))


@contextmanager
def explained(builder: Builder, during: str) -> Iterator[None]:
    """Turns a CUDA out-of-memory error into one that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise builder.out_of_memory(error, during) from error

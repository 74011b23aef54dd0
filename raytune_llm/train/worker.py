"""What one worker of a run does, from stores and config to trained weights. Knows no Ray: launch.py calls it in every process."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raytune_llm.config.run import TrainRun
from raytune_llm.data.loader import Loader, Samples, split_sources
from raytune_llm.data.mixture import mixed_rows
from raytune_llm.data.store import Store
from raytune_llm.data.tokenizer import run_tokenizer, stop_ids
from raytune_llm.errors import DataError
from raytune_llm.models.policy import build_policy, compute_dtype, run_config
from raytune_llm.stages import STAGES
from raytune_llm.train import loop
from raytune_llm.train.checkpoint import Checkpoints, Progress, complete_steps, read_progress
from raytune_llm.train.clock import Clock
from raytune_llm.train.flops import flops_per_token, peak_flops
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.output import identity, model_card, write_final
from raytune_llm.train.report import Report
from raytune_llm.train.schedules import learning_rate
from raytune_llm.train.strategies import spread
from raytune_llm.train.strategies.base import Precision, Strategy

Sink = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Begin:
    """What a run knows of itself when its first step is about to come."""

    total_steps: int
    first_step: int
    """The step of the checkpoint that it goes on from, or 0."""
    attention: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the first worker reports when a run is done."""

    progress: Progress
    world_size: int
    tokens_per_s: float | None
    mfu: float | None
    peak_memory_gib: float
    load_s: float
    train_s: float
    save_s: float


def work(
    run: TrainRun,
    train_store: str,
    eval_store: str | None,
    *,
    device: torch.device,
    sinks: Sequence[Sink] = (),
    on_begin: Callable[[Begin], None] = lambda begin: None,
) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the end. Sinks get every record, on the first worker only."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    began = time.perf_counter()
    if device.type == "cuda":
        # Read when the first tensor comes to the GPU: pages grow in place, so that changing sizes leave no holes.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    stage = STAGES[run.stage.name]
    objective = stage.objective(run.stage)
    tokenizer, template = run_tokenizer(run.model, run.data, needs_template=stage.rows != "text")
    stores = open_stores(run, train_store, eval_store)
    micro, seed = run.train.micro_batch_size, run.train.seed
    share = {"micro_batch_size": micro, "rank": rank, "world_size": world, "seed": seed, "pad_id": tokenizer.pad_token_id or 0}
    loader = Loader(stores.train, global_batch_size=run.train.global_batch_size, **share)
    eval_loaders = {
        source: Loader(samples, global_batch_size=micro * world, shuffle=False, **share)
        for source, samples in stores.held_out.items()
    }
    steps = total_steps(run, loader.steps_per_epoch)

    config = run_config(run.model, tokenizer, run.data.max_length)
    compute = compute_dtype(run.train.precision, device)
    policy, attention = build_policy(
        config,
        run.model,
        run.adapter,
        compute=compute,
        seed=seed,
        device=device,
        quantization=run.quantization.name,
        compile_layers=run.train.compile,
        activation_checkpointing=run.train.activation_checkpointing,
    )
    flops = flops_per_token(policy, config)
    strategy = spread(
        run.strategy,
        policy,
        partial(build_optimizer, run.optimizer),
        device=device,
        precision=Precision(compute),
        max_grad_norm=run.train.max_grad_norm,
    )

    with ExitStack() as stack:
        output = Path(run.output_dir)
        keep_best = run.checkpoint.final == "best"
        checkpoints = Checkpoints(
            output / "checkpoints",
            keep=run.checkpoint.keep,
            keep_best=keep_best,
            asynchronous=run.checkpoint.asynchronous,
        )
        stack.callback(checkpoints.close)
        progress = restore(checkpoints, strategy)
        report = stack.enter_context(Report(output, from_step=progress.step, sinks=sinks)) if rank == 0 else None
        loaded = time.perf_counter()
        save_s = 0.0

        def log(record: Mapping[str, Any]) -> None:
            if report is None:
                return
            extra: dict[str, Any] = {}
            if "loss" in record:
                extra["memory_gib"] = round(memory_gib(device), 3)
                if (peak := peak_flops(device)) is not None:
                    extra["mfu"] = round(record["tokens_per_s"] * flops / (peak * world), 4)
            report.log({**record, **extra})

        same = identity(run, stores.manifests)

        def save(progress: Progress) -> None:
            nonlocal save_s
            at = time.perf_counter()
            checkpoints.save(strategy.state(), progress, same)
            save_s += time.perf_counter() - at

        if rank == 0:
            on_begin(Begin(total_steps=steps, first_step=progress.step, attention=attention))
        strategy.model.train()
        clock = Clock()
        progress = loop.run(
            strategy,
            objective.loss,
            loader,
            eval_loaders,
            learning_rate(run.schedule, peak=run.optimizer.lr, total=steps),
            progress,
            loop.Plan(
                total_steps=steps,
                log_every=run.train.log_every_steps,
                eval_every=run.train.eval_every_steps,
                save_every=run.checkpoint.every_steps,
                save_best=keep_best,
                early_stopping=run.train.early_stopping,
                max_nonfinite_steps=run.train.max_nonfinite_steps,
                seed=seed,
            ),
            loop.Hooks(log=log, save=save),
            clock,
            device,
        )
        trained = time.perf_counter()
        checkpoints.wait()
        if keep_best and progress.best_step not in (None, progress.step):
            checkpoints.load(progress.best_step, strategy.load)  # type: ignore[arg-type]
        parameters = {name: value for name, value in strategy.full_parameters() if rank == 0}
        if rank == 0:
            write_final(
                output / "final",
                policy,
                parameters,
                tokenizer,
                stop_ids=stop_ids(tokenizer, template),
                base_model=run.model.path or "",
                dtype=compute,
                card=model_card(run, progress.step, progress.loss_last),
            )
        if dist.is_initialized():
            dist.barrier()
    rate = clock.rate()
    peak = peak_flops(device)
    return Outcome(
        progress=progress,
        world_size=world,
        tokens_per_s=rate,
        mfu=None if peak is None or rate is None else rate * flops / (peak * world),
        peak_memory_gib=memory_gib(device),
        load_s=loaded - began,
        train_s=trained - loaded - save_s,
        save_s=save_s + time.perf_counter() - trained,
    )


@dataclass(frozen=True)
class Stores:
    train: Samples
    held_out: dict[str, Samples]
    """By source; a single one has no name ("")."""
    manifests: dict[str, str]


def open_stores(run: TrainRun, train_store: str, eval_store: str | None) -> Stores:
    """The samples to train on and those held out."""
    store = Store.open(train_store)
    rows, held_out_rows = split_sources(store, run.data.eval_fraction, run.train.seed)
    rows = mixed_rows(
        store,
        rows,
        strategy=run.data.mix,
        weights=run.data.mix_weights,
        temperature=run.data.mix_temperature,
        epochs=run.data.mix_epochs,
        seed=run.train.seed,
    )
    evaluated = store if eval_store is None else Store.open(eval_store)
    if eval_store is not None:
        _, held_out_rows = split_sources(evaluated, 1.0, run.train.seed)
    packing = {"max_length": run.data.max_length, "packing": run.data.packing}
    train = Samples(store, rows, **packing)
    held_out = {name: Samples(evaluated, rows, **packing) for name, rows in held_out_rows.items()}
    for what, samples in (("train", train), *((f"held-out {name}".strip(), samples) for name, samples in held_out.items())):
        if not samples.targets.sum():
            raise DataError(str(run.data.path), f"the {what} rows have no token to learn", "Check data.format and the answers.")
    manifests = {"train": store.manifest_hash} | ({"evaluation": evaluated.manifest_hash} if eval_store is not None else {})
    return Stores(train, held_out, manifests)


def total_steps(run: TrainRun, steps_per_epoch: int) -> int:
    steps = run.train.epochs * steps_per_epoch
    return steps if run.train.max_steps is None else min(steps, run.train.max_steps)


def restore(checkpoints: Checkpoints, strategy: Strategy) -> Progress:
    """From the newest complete checkpoint, where there is one."""
    steps = complete_steps(checkpoints.folder)
    if not steps:
        return Progress()
    progress, _ = read_progress(checkpoints.folder, steps[-1])
    checkpoints.load(steps[-1], strategy.load)
    return progress


def memory_gib(device: torch.device) -> float:
    """The most that this worker has used: of the GPU, or of the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

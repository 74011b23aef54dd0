"""What one worker of a run does, from stores and config to trained weights. Knows no Ray: launch.py calls it in every process."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from raytune_llm.config.adapter import LoRA
from raytune_llm.config.run import TrainRun
from raytune_llm.data.batches import KINDS
from raytune_llm.data.loader import Loader
from raytune_llm.data.tokenizer import run_tokenizer, stop_ids
from raytune_llm.models.load import load_model
from raytune_llm.models.policy import run_config
from raytune_llm.stages import STAGES
from raytune_llm.train import loop
from raytune_llm.train.build import Builder
from raytune_llm.train.checkpoint import Checkpoints, Progress, complete_steps, read_progress
from raytune_llm.train.clock import Clock
from raytune_llm.train.flops import peak_flops
from raytune_llm.train.output import identity, model_card, write_final
from raytune_llm.train.profile import StepProfile
from raytune_llm.train.reference import find_references
from raytune_llm.train.report import JsonLines, Report
from raytune_llm.train.samples import SAMPLES, Sample, Sampler
from raytune_llm.train.schedules import learning_rate
from raytune_llm.train.scores import held_out_scores, write_scores
from raytune_llm.train.stores import open_stores, shares_prompts, total_steps
from raytune_llm.train.strategies.base import Strategy

Sink = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class ReferencePass:
    """How far log-probabilities under the reference are computed, in rows."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Begin:
    """What a run knows of itself when its first step is about to come."""

    total_steps: int
    first_step: int
    """The step of the checkpoint that it goes on from, or 0."""
    choices: tuple[str, ...]
    """What was chosen for it and why, a line each."""


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
    on_begin: Callable[[Begin | ReferencePass], None] = lambda begin: None,
    on_samples: Callable[[Sequence[Sample]], None] = lambda samples: None,
) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the end. Sinks get every record, on the first worker only."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    began = time.perf_counter()
    stage = STAGES[run.stage.name]
    objective = stage.objective(run.stage)
    tokenizer, template = run_tokenizer(run.model, run.data, needs_template=stage.rows != "text")
    config = run_config(run.model, tokenizer, run.data.max_length)
    shares = shares_prompts(run, stage.rows, lambda: config)
    stores = open_stores(run, train_store, eval_store, share_prompts=shares)
    micro, seed = run.train.micro_batch_size, run.train.seed
    share = {"micro_batch_size": micro, "rank": rank, "world_size": world, "seed": seed, "pad_id": tokenizer.pad_token_id or 0}
    builder = Builder(run, config, device)
    with explained(builder, "loading the model"):
        built = builder.build()
    policy, strategy, flops = built.policy, built.strategy, built.flops_per_token
    with explained(builder, "the pass of the reference"):
        references = find_references(
            run,
            objective.reference,
            strategy,
            stores,
            config,
            device=device,
            compute=policy.compute,
            pad_id=share["pad_id"],
            tell=lambda done, total: on_begin(ReferencePass(done=done, total=total)) if rank == 0 else None,
        )
    share["global_batch_size"] = run.train.global_batch_size
    loader = Loader(stores.train, **share, **references.finish(stores.train))
    eval_loaders = {
        source: Loader(samples, shuffle=False, **share, **references.finish(samples))
        for source, samples in stores.held_out.items()
    }
    steps = total_steps(run, loader.steps_per_epoch)

    with ExitStack() as stack:
        stack.enter_context(explained(builder, "training"))
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
        sampler = None
        if run.train.sample_rows and stores.evaluated is not None:
            sampler = Sampler(
                strategy,
                tokenizer,
                stores.evaluated,
                [row for samples in stores.held_out.values() for row in samples.rows[: run.train.sample_rows].tolist()],
                max_new_tokens=run.train.max_new_tokens,
                stop_ids=stop_ids(tokenizer, template),
                device=device,
            )
        sampled = None
        if rank == 0 and sampler is not None:
            sampled = stack.enter_context(JsonLines(output / SAMPLES, from_step=progress.step))
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

        def sample(step: int) -> None:
            samples = sampler(step) if sampler is not None else []
            if sampled is not None:
                for one in samples:
                    sampled.write(one.to_json())
                on_samples(samples)

        if rank == 0:
            choices = built.choices + references.choices
            if KINDS[stage.rows].shares:
                choices += (f"requests: {'computed once for both answers' if shares else 'a copy for each of two answers'}",)
            on_begin(Begin(total_steps=steps, first_step=progress.step, choices=choices))
        hooks = loop.Hooks(log=log, save=save, sample=sample)
        if run.train.profile and rank == 0:
            thin = 4 * run.adapter.rank if isinstance(run.adapter, LoRA) else 0  # of q, k and v together, say
            profile = StepProfile(output, device, first_step=progress.step, total_steps=steps, thin=thin)
            stack.callback(profile.close)
            hooks = replace(hooks, stepped=profile.stepped)
        strategy.model.train()
        clock = Clock()
        progress = loop.run(
            strategy,
            objective,
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
            hooks,
            clock,
            device,
            references.online,
        )
        trained = time.perf_counter()
        checkpoints.wait()
        if keep_best and progress.best_step not in (None, progress.step):
            checkpoints.load(progress.best_step, strategy.load)  # type: ignore[arg-type]
        if stage.scores is not None and eval_loaders:
            pairs = held_out_scores(strategy.model, stage.scores, eval_loaders, device)
            if rank == 0:
                write_scores(pairs, output)
        parameters = {name: value for name, value in strategy.full_parameters() if rank == 0}
        if rank == 0:
            write_final(
                output / "final",
                policy,
                parameters,
                tokenizer,
                stop_ids=stop_ids(tokenizer, template),
                base_model=run.model.path or "",
                dtype=policy.compute,
                card=model_card(run, progress.step, progress.loss_last),
                language_model=partial(language_model, run, config) if objective.separate_head else None,
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


@contextmanager
def explained(builder: Builder, during: str) -> Iterator[None]:
    """A GPU whose memory ran out becomes an error that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise builder.out_of_memory(error, during) from error


def language_model(run: TrainRun, config: PretrainedConfig) -> PreTrainedModel:
    """What the run's model was made from, as a language model in host memory."""
    return load_model(
        config,
        run.model.path,
        weights=run.model.weights,
        dtype=torch.float32,
        seed=run.train.seed,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )


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

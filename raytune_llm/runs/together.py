"""Trains several runs over one base on one device, with one pass per step for all. worker.py does the same for a single run.

The runs see the same packs. Each has its own output folder, with the records, checkpoints and final adapter of a single run, and
can be resumed by itself from any of its checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from raytune_llm.config.run import TrainRun
from raytune_llm.memory.flops import Operations
from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.adapters.routes import Dropout
from raytune_llm.models.build import run_config
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.shared_pass import OneOfSeveral, SharedPass
from raytune_llm.report.metrics import Sink
from raytune_llm.report.slow import notify_if_slow
from raytune_llm.report.updates import RunStarted, SampledAnswer, Update
from raytune_llm.runs.build import Builder, Built
from raytune_llm.runs.outcome import TrainOutcome
from raytune_llm.runs.setup import Reads, Setup, complete, explained, reads_of
from raytune_llm.runs.worker import Recorder, Times, check_loss, checkpoints_of, finish, restore, train_outcome
from raytune_llm.runs.workspace import Workspace
from raytune_llm.train import together
from raytune_llm.train.clock import Clock
from raytune_llm.train.optimizers import optimizer_of
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.in_bank import InBank
from raytune_llm.train.together import Member
from raytune_llm.train.window import Window

SIZES = (16, 8, 4, 2)
"""Possible sizes of a bank, in adapters."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the runs that train together, with its callbacks."""

    run: TrainRun
    sinks: Sequence[Sink] = ()
    on_update: Callable[[Update], None] = lambda update: None
    on_samples: Callable[[Sequence[SampledAnswer]], None] = lambda samples: None
    stops: Callable[[], bool] = lambda: False
    """Called after each evaluation. True: end the run there, with a checkpoint and without final/."""


Ending = TrainOutcome | Exception | None
"""How a run ended: its outcome, the error that it failed with, or None if its `stops` ended it."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many runs like a given one fit on a device, by estimate."""

    usable_bytes: float
    """Bytes that the device has for runs; infinite without a GPU."""
    alone_bytes: float
    """The memory of a single run with its own base."""
    pair_bytes: float
    """The memory of two runs in one pass over one base."""
    together: int
    """The number of runs that fit in one pass; 1 if not even two do."""


def room_for(run: TrainRun, device: torch.device, workspace: Workspace) -> Room:
    tokenizer, _ = workspace.tokenizer_of(run)
    config = run_config(run.model, tokenizer, run.data.max_length, packing=run.data.packing)
    builders = {size: Builder(run, config, device, together=[run] * size) for size in SIZES}
    return Room(
        usable_bytes=builders[2].usable_bytes,
        alone_bytes=Builder(run, config, device).estimated_bytes,
        pair_bytes=builders[2].estimated_bytes,
        together=next((size for size, builder in builders.items() if builder.fits), 1),
    )


def fit_together(parts: Sequence[Part], train_store: str, eval_store: str | None, *, workspace: Workspace) -> list[Ending]:
    """Train the parts together on this process's device."""
    return work_together(parts, train_store, eval_store, device=device_here(), workspace=workspace)


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def work_together(
    parts: Sequence[Part],
    train_store: str,
    eval_store: str | None,
    *,
    device: torch.device,
    workspace: Workspace | None = None,
) -> list[Ending]:
    """Train all parts, each from its newest checkpoint or from the start, until each has ended. Only runs at the same step can
    share a pass, so the ones that are furthest behind go first."""
    began = time.perf_counter()
    runs = [part.run for part in parts]
    workspace = workspace or Workspace()
    reads = reads_of(runs[0], train_store, eval_store, workspace)
    builder = Builder(runs[0], reads.config, device, shared=workspace.base, together=runs)
    with explained(builder, "loading the model"), notify_if_slow(parts[0].on_update, "loading the model"):
        policy, counted, choices = builder.policy()
    assert isinstance(policy, CausalLM)
    policy.to(device).train()
    pass_ = SharedPass(policy, at_once=builder.at_once)
    passes = (
        "in one pass a step" if builder.at_once >= len(parts) else f"{builder.at_once} in a pass, as many as there is room for"
    )
    choices += (f"base: one for {len(parts)} runs, which are computed {passes}",)
    with explained(builder, "training"), ExitStack() as stack:
        all_of_them = [
            _One(part, f"run{number}", pass_, reads, builder, counted, choices, stack, began) for number, part in enumerate(parts)
        ]
        of_member = {one.member: one for one in all_of_them}

        def ended(member: Member, error: Exception | None) -> None:
            of_member[member].end(error)
            _make_room(pass_.bank, member, [one.member for one in all_of_them if not one.ended])

        first = all_of_them[0].setup
        for step in sorted({one.member.progress.step for one in all_of_them}):
            members = [one.member for one in all_of_them if not one.ended and one.first_step == step]
            together.run(pass_, members, first.source, first.held_out, ended)
    return [one.ending for one in all_of_them]


def _make_room(bank: LoraBank, member: Member, others: Sequence[Member]) -> None:
    """Remove an adapter from the bank, and shrink the bank to the next power of two that holds the others."""
    bank.remove(member.model.name)
    size = 1 << (len(others) - 1).bit_length()
    if others and size < bank.num_slots:
        bank.resize(size)
        for other in others:
            other.strategy.moved()


@dataclass(eq=False)
class _One:
    """One of the runs, from its setup to its end."""

    part: Part
    name: str
    """The name of its adapter in the bank."""
    pass_: SharedPass
    reads: Reads
    builder: Builder
    counted: Operations
    choices: tuple[str, ...]
    outer: ExitStack
    began: float
    ended: bool = False
    ending: Ending = None
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        part, setup = self.part, self._set_up()
        self.setup = setup
        self.outer.enter_context(self.stack)
        settings, clock = setup.loop_settings(), Clock()
        self.checkpoints = checkpoints_of(setup, self.stack)
        strategy: Any = setup.built.strategy
        progress = restore(self.checkpoints, strategy)
        self.first_step = progress.step
        self.recorder = Recorder(
            setup, clock, self.checkpoints, self.stack, progress.step, part.sinks, part.on_samples, part.on_update
        )
        self.loaded = time.perf_counter()
        part.on_update(RunStarted(total_steps=settings.total_steps, first_step=progress.step, choices=setup.choices))
        self.member = Member(
            strategy=strategy,
            objective=setup.objective,
            enrichers=setup.enrichers,
            progress=progress,
            settings=settings,
            hooks=together.loop.Hooks(log=self.recorder.log, save=self.recorder.save, sample=self.recorder.sample),
            clock=clock,
            window=Window(setup.device, progress.window),
            stops=part.stops,
        )

    def end(self, error: Exception | None) -> None:
        """Write the run's final files, or keep the error that it failed with."""
        self.ended, trained = True, time.perf_counter()
        try:
            if error is not None:
                raise error
            self.checkpoints.wait()
            progress, settings = self.member.progress, self.member.settings
            if self.part.stops() and progress.step < settings.total_steps:
                return
            check_loss(progress)
            paused = self.member.at_end and progress.step < settings.total_steps
            if not paused:
                finish(self.setup, self.checkpoints, progress, self.part.on_update)
            times = Times(began=self.began, loaded=self.loaded, trained=trained, in_training_s=self.recorder.save_s)
            self.ending = train_outcome(self.setup, progress, self.member.clock, times, paused=paused)
        except Exception as raised:
            self.ending = raised
        finally:
            self.stack.close()

    def _set_up(self) -> Setup:
        run, bank = self.part.run, self.pass_.bank
        seed = run.train.seed if run.train.adapter_seed is None else run.train.adapter_seed
        bank.add(self.name, run.adapter, seed=seed)
        device, rate = self.builder.device, run.adapter.dropout
        dropout = Dropout(rate, torch.Generator(device)) if rate else None
        strategy = InBank(
            self.pass_,
            OneOfSeveral(self.pass_, self.name, dropout),
            partial(optimizer_of, run.optimizer, fused=True),
            Training(device, self.pass_.policy.compute, run.train.max_grad_norm),
        )
        built = Built(
            policy=self.pass_.policy,
            strategy=strategy,
            operations=self.counted,
            choices=self.choices,
            adapter=self.name,
        )
        return complete(run, self.reads, self.builder, built, self.part.on_update)

"""The training loop of several runs that see the same packs: one forward and backward pass for all, then a step of each.

Each run has its own objective, learning rate, schedule, optimizer, clipping and progress. It logs and saves by itself, and when
it ends, the others continue. Steps, log records, evaluations and checkpoints are the same as in the loop of one run (loop.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch

from raytune_llm.data.batches import to_device
from raytune_llm.data.loader import Loader
from raytune_llm.data.steps import Step, StepSource
from raytune_llm.models.shared_pass import OneOfSeveral, SharedPass
from raytune_llm.records import Batch
from raytune_llm.stages import Objective
from raytune_llm.train import loop
from raytune_llm.train.clock import Clock
from raytune_llm.train.enrichers import Enricher
from raytune_llm.train.phases import phase
from raytune_llm.train.progress import Progress
from raytune_llm.train.strategies.in_bank import InBank, backward, clear_gradients
from raytune_llm.train.window import Window


@dataclass(kw_only=True, eq=False)
class Member:
    """One of the runs."""

    strategy: InBank
    objective: Objective
    enrichers: Sequence[Enricher]
    progress: Progress
    settings: loop.LoopSettings
    hooks: loop.Hooks
    clock: Clock
    window: Window
    stops: Callable[[], bool] = lambda: False
    """Called after each evaluation. True: end the run here with a checkpoint, whatever its own settings say."""

    @property
    def model(self) -> OneOfSeveral:
        return self.strategy.model

    @property
    def learner(self) -> loop.Learner:
        return loop.Learner(strategy=self.strategy, objective=self.objective, device=self.window.device, enrichers=self.enrichers)

    @property
    def at_end(self) -> bool:
        """Whether it has made its last step, or the last one before a pause."""
        return self.progress.step >= (self.settings.pause_step or self.settings.total_steps)


Ended = Callable[[Member, Exception | None], None]
"""Called with a run that has ended, and with the error if its hooks raised one. It takes part in no further pass."""


def run(pass_: SharedPass, members: Sequence[Member], source: StepSource, held_out: Mapping[str, Loader], ended: Ended) -> None:
    """Train all runs until each has ended. They must all be at the same step."""
    active = list(members)
    for member in active:
        loop.resume(member.enrichers, member.progress)
        member.clock.start()
    _each(active, ended, lambda member: member.at_end)
    starting = [member for member in active if member.settings.eval_on_start and held_out and not member.progress.step]
    _evaluate(pass_, starting, active, held_out, ended)
    if not active:
        return
    with closing(source.steps(active[0].progress, pass_.policy)) as steps:
        for step in steps:
            rates = one_step(pass_, active, step)
            _each(active, ended, lambda member, step=step, rates=rates: _log(member, step, rates[member]))
            due = [
                member
                for member in active
                if held_out and (member.at_end or member.settings.evaluates(member.progress.step, step.ends_epoch))
            ]
            stopped = _evaluate(pass_, due, active, held_out, ended)
            _each(active, ended, lambda member, step=step, stopped=stopped: _save(member, step, source, member in stopped))
            if not active:
                break


def one_step(pass_: SharedPass, members: Sequence[Member], step: Step) -> dict[Member, float]:
    """One forward and backward pass per micro-batch (or one per group, see SharedPass), then an update of each run. Returns the
    runs' learning rates."""
    batches = _ready(members, step)
    count = loop.count_of(step, members[0].window.device)
    rates = {member: member.settings.learning_rate(member.progress.step) for member in members}
    for group in pass_.in_turn(members, _model):
        with pass_.of([member.model for member in group]):
            of_each = [_completed(member, step, batches) for member in group]
            for batches_of_each in zip(*of_each, strict=True):
                with phase("forward pass"):
                    for member, batch in zip(group, batches_of_each, strict=True):
                        out = member.objective.loss(member.model, batch)
                        member.strategy.backward(out.total / count, rates[member])
                        member.window.add_loss(out)
                with phase("backward pass"):
                    backward([member.strategy for member in group])
                pass_.forget()
    with phase("optimizer step"):
        for member in members:
            loop.add_step(member.window, member.strategy.step(rates[member]), 1)
    clear_gradients(pass_.policy)
    return rates


def evaluations(pass_: SharedPass, members: Sequence[Member], held_out: Mapping[str, Loader]) -> list[dict[str, float]]:
    """The record of an evaluation (loop.evaluation) for each run."""
    pass_.policy.eval()
    found: dict[Member, dict[str, float]] = {}
    with torch.no_grad():
        for group in pass_.in_turn(members, _model):
            found |= _evaluations(pass_, group, held_out)
    pass_.policy.train()
    return [found[member] for member in members]


def _evaluations(pass_: SharedPass, members: Sequence[Member], held_out: Mapping[str, Loader]) -> dict[Member, dict[str, float]]:
    """The same for the runs of one group, which are evaluated in one pass."""
    sums: list[dict[str, dict[str, tuple[float, float]]]] = [{} for _ in members]
    with pass_.of([member.model for member in members]):
        for source, loader in held_out.items():
            windows = [Window(member.window.device, {}) for member in members]
            for step in loader.epoch(0):
                batches = _ready(members, step)
                of_each = [_completed(member, replace(step, held_out=True), batches) for member in members]
                for member, window, own in zip(members, windows, of_each, strict=True):
                    for batch in own:
                        with phase("evaluation"):
                            window.add_loss(member.objective.loss(member.model, batch))
                pass_.forget()
            for of_sources, window in zip(sums, windows, strict=True):
                of_sources[source] = window.read()
    pairs = zip(members, sums, strict=True)
    return {member: loop.evaluated(member.objective, of_sources) for member, of_sources in pairs}


def _model(member: Member) -> OneOfSeveral:
    return member.model


def _ready(members: Sequence[Member], step: Step) -> list[Batch]:
    """The micro-batches on the device, shared by all runs."""
    return [to_device(batch, members[0].window.device) for batch in step.batches]


def _completed(member: Member, step: Step, batches: Sequence[Batch]) -> list[Batch]:
    """The batches of one run, with its own seed and the columns of its enrichers."""
    seed = member.settings.seed if step.held_out else member.settings.seed + member.progress.step
    member.model.seed = seed
    return loop.completed(member.learner, step, batches, seed=seed)


def _evaluate(
    pass_: SharedPass, due: list[Member], active: list[Member], held_out: Mapping[str, Loader], ended: Ended
) -> set[Member]:
    """Evaluate the runs that are due in one pass, and remove runs that fail from `active`. Returns the runs that stop early."""
    if not due:
        return set()
    stopped: set[Member] = set()
    with ExitStack() as stack:
        for member in active:
            stack.enter_context(member.clock.stopped())
        records = dict(zip(due, evaluations(pass_, due, held_out), strict=True))

        def conclude(member: Member) -> bool:
            if member in records:
                if member.progress.step == 0:
                    member.hooks.log({"step": 0, **records[member]})
                elif loop.log_evaluation(records[member], member.progress, member.settings, member.hooks) or member.stops():
                    stopped.add(member)
                member.hooks.sample(member.progress.step)
            return False

        _each(active, ended, conclude)
    return stopped


def _log(member: Member, step: Step, lr: float) -> bool:
    progress, settings = member.progress, member.settings
    loop.advance(progress, step)
    member.clock.stepped(step.tokens, sum(batch.attention_pairs for batch in step.batches))
    for stepped in member.hooks.stepped:
        stepped(progress.step)
    if progress.step in (1, settings.total_steps) or progress.step % settings.log_every == 0:
        epoch = step.epoch + step.fraction
        loop.log_step(progress, member.objective, member.window, member.clock, settings, member.hooks, epoch=epoch, lr=lr)
    return False


def _save(member: Member, step: Step, source: StepSource, stopped: bool) -> bool:
    """Save the run's checkpoint if it is due. Returns whether the run has ended."""
    progress, settings = member.progress, member.settings
    best = settings.save_best and progress.best_step == progress.step
    ends = member.at_end or stopped
    if ends or best or loop.due(progress.step, settings.save_every, step.ends_epoch):
        with member.clock.stopped():
            loop.save(progress, member.window, source, member.enrichers, member.hooks)
    return ends


def _each(active: list[Member], ended: Ended, does: Callable[[Member], bool]) -> None:
    """Call it for each run. A run that ends or fails in it is removed and reported; the others continue."""
    for member in list(active):
        error: Exception | None = None
        try:
            ends = does(member)
        except Exception as raised:
            ends, error = True, raised
        if ends:
            active.remove(member)
            ended(member, error)

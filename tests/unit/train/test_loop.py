"""The loop over sources, strategies and enrichers of a test's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.data.loader import Loader
from raytune_llm.data.samples import Samples
from raytune_llm.data.steps import Step
from raytune_llm.stages import Objective
from raytune_llm.train import loop
from raytune_llm.train.clock import Clock
from raytune_llm.train.progress import Progress
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.ddp import DDPStrategy
from tests.models import some_rows, tiny_llama
from tests.steps import make_store, objective_of

CPU = torch.device("cpu")
LENGTHS = [17, 5, 30, 9, 24, 12, 6, 20, 11, 8, 14]


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    rows = [ConversationRow(ids, spans) for ids, spans in some_rows(LENGTHS)]
    store = make_store(tmp_path_factory.mktemp("store"), "conversations", rows)
    samples = Samples(store, np.arange(len(store)), max_length=48, packing=False)
    return Loader(samples, micro_batch_size=2, global_batch_size=4, rank=0, world_size=1, seed=0, pad_id=0)


class Counting:
    """A source that reads the policy, is not prefetched, knows no counts, and remembers how often it was asked."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.asked, self.seen = loader, 0, []

    def steps(self, progress: Any, policy: Any) -> Iterator[Step]:
        self.asked = progress.source_state.get("asked", 0)
        for step in self.loader.steps(progress, policy):
            self.asked += 1
            self.seen.append(next(policy.parameters()).detach().flatten()[0].item())
            yield replace(step, count=None)

    def state(self) -> dict[str, int]:
        return {"asked": self.asked}


class Recorder:
    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.saved: list[Progress] = []

    def hooks(self) -> loop.Hooks:
        return loop.Hooks(log=self.logged.append, save=self.saved.append, sample=lambda step: None)

    @property
    def numbers(self) -> list[float]:
        return [record[name] for record in self.logged if "loss" in record for name in ("loss", "grad_norm")]


def learner_of(objective: Objective | None = None, enrichers: Any = ()) -> loop.Learner:
    strategy = DDPStrategy(
        tiny_llama(),
        lambda model, fused: torch.optim.AdamW(model.parameters(), fused=fused),
        Training(CPU, torch.float32, max_grad_norm=1.0),
    )
    return loop.Learner(strategy=strategy, objective=objective or objective_of("stage=sft"), device=CPU, enrichers=enrichers)


def settings_of(total_steps: int, **others: Any) -> loop.LoopSettings:
    usual = {
        "log_every": 1,
        "eval_every": None,
        "eval_steps": None,
        "save_every": 2,
        "save_best": False,
        "early_stopping": None,
        "eval_on_start": False,
    }
    return loop.LoopSettings(
        pause_step=None,
        total_steps=total_steps,
        learning_rate=lambda step: 1e-2,
        max_nonfinite_steps=0,
        seed=0,
        **{**usual, **others},
    )


def trained(learner: loop.Learner, source: Any, total_steps: int, progress: Progress | None = None, **held_out: Any) -> Recorder:
    recorder = Recorder()
    settings = settings_of(total_steps)
    loop.run(learner, source, held_out, progress or Progress(), settings, recorder.hooks(), Clock())
    return recorder


def test_a_count_that_is_only_known_from_the_batches_gives_the_same_steps(loader: Loader) -> None:
    known, summed = trained(learner_of(), loader, 5), trained(learner_of(), Counting(loader), 5)
    assert known.numbers == pytest.approx(summed.numbers, rel=1e-6)
    assert len(known.numbers) == 2 * 5


def test_batches_say_what_their_steps_are_divided_by(loader: Loader) -> None:
    for step in loader.epoch(0):
        assert step.count == sum(batch.count for batch in step.batches) > 0


def _count_on(rank: int, world: int, meeting: Path, step: Step) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    mine = replace(step, batches=step.batches[rank::world], count=None)
    assert loop.count_of(mine, CPU) == step.count != sum(batch.count for batch in mine.batches)
    dist.destroy_process_group()


def test_counts_that_only_batches_know_are_summed_over_workers(loader: Loader, tmp_path: Path) -> None:
    step = next(iter(loader.epoch(0)))
    torch.multiprocessing.spawn(_count_on, (2, tmp_path / "meeting", step), nprocs=2)


def test_a_source_that_looks_at_the_policy_finds_it_as_the_last_step_left_it(loader: Loader) -> None:
    source = Counting(loader)
    trained(learner_of(), source, 4)
    assert len(set(source.seen)) == 4


def test_a_source_goes_on_from_what_it_remembers(loader: Loader) -> None:
    saved = trained(learner_of(), Counting(loader), 4).saved
    assert [(progress.step, progress.source_state) for progress in saved] == [(2, {"asked": 2}), (4, {"asked": 4})]
    resumed = trained(learner_of(), Counting(loader), 6, replace(saved[-1]))
    assert resumed.saved[-1].source_state == {"asked": 6}


def test_epochs_follow_one_another_until_the_last_step(loader: Loader) -> None:
    recorder = trained(learner_of(), loader, 7)
    assert loader.steps_per_epoch == 3
    done = [4, 8, 11, 15, 19, 22, 26]  # rows
    assert [record["epoch"] for record in recorder.logged] == pytest.approx([rows / 11 for rows in done], abs=1e-5)
    last = recorder.saved[-1]
    assert (last.step, last.epoch, last.cursor) == (7, 2, 4)


def test_a_run_that_is_done_asks_for_no_step(loader: Loader) -> None:
    source = Counting(loader)
    assert trained(learner_of(), source, 4, Progress(step=4)).logged == [] and source.asked == 0


class Numbered:
    """An enricher that adds its number, to what is there, and counts the steps that are learned from."""

    def __init__(self, number: int) -> None:
        self.number, self.learned, self.phase = number, 0, f"number {number}"

    def attach(self, policy: Any, batches: Any, step: Step) -> list[Any]:
        self.learned += not step.held_out
        return [
            batch.with_answers(
                {"numbers": torch.cat([batch.per_answer.get("numbers", torch.zeros(0)), torch.tensor([self.number])])}
            )
            for batch in batches
        ]

    def state(self) -> int:
        return self.learned

    def load(self, state: int) -> None:
        self.learned = state


def test_enrichers_add_in_their_order_and_remember_only_what_is_learned_from(loader: Loader) -> None:
    objective, seen = objective_of("stage=sft"), []

    def loss(model: Any, batch: Any) -> Any:
        seen.append(batch.per_answer["numbers"].tolist())
        return objective.loss(model, batch)

    enrichers = [Numbered(3), Numbered(7)]
    learner = learner_of(replace(objective, loss=loss), enrichers)
    recorder = trained(learner, loader, 3, held=loader)
    assert len(seen) == 2 * 6 and all(numbers == [3, 7] for numbers in seen)
    assert recorder.saved[-1].enricher_states == [3, 3]
    later = [Numbered(3), Numbered(7)]
    resumed = trained(learner_of(replace(objective, loss=loss), later), loader, 4, replace(recorder.saved[-1]))
    assert resumed.saved[-1].enricher_states == [4, 4]


def test_an_early_stop_saves_and_ends(loader: Loader) -> None:
    learner, recorder = learner_of(), Recorder()
    settings = replace(settings_of(50, eval_every=1, early_stopping=1, save_every=100), learning_rate=lambda step: 1.0)
    progress = loop.run(learner, loader, {"": loader}, Progress(), settings, recorder.hooks(), Clock())
    assert progress.step < 50
    assert [saved.step for saved in recorder.saved] == [progress.step]


def test_evaluations_may_be_after_some_steps_alone(loader: Loader) -> None:
    recorder, settings = Recorder(), settings_of(7, eval_every=1, eval_steps=frozenset({2, 5}))
    loop.run(learner_of(), loader, {"": loader}, Progress(), settings, recorder.hooks(), Clock())
    assert [record["step"] for record in recorder.logged if "eval_loss" in record] == [2, 5, 7]


def test_the_time_that_steps_are_waited_for_is_a_fraction_of_the_clock_s():
    def slow_steps() -> Iterator[int]:
        for step in range(3):
            time.sleep(0.05)
            yield step

    clock = Clock()
    clock.start()
    for _ in clock.awaited(slow_steps()):
        time.sleep(0.05)
    clock.read()
    assert 0.1 < clock.data_wait < 0.9
    time.sleep(0.01)
    clock.read()
    assert clock.data_wait == 0, "it is that of the steps since the last reading"

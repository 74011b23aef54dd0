"""Several runs in one pass over one base are each what they are alone, and go on alone from their checkpoints."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_llm import api
from raytune_llm.config.run import TrainRun
from raytune_llm.data import pipeline
from raytune_llm.report.metrics import read_metrics
from raytune_llm.runs.outcome import TrainOutcome
from raytune_llm.runs.together import Part, work_together
from raytune_llm.runs.worker import work
from tests.runs import tiny_run

CPU = torch.device("cpu")
STEPS, EVERY = 30, 10
COMMON = ("train.global_batch_size=4", "train.micro_batch_size=2", "data.max_length=128", f"checkpoint.every_steps={EVERY}",
          f"train.eval_every_steps={EVERY}", f"train.max_steps={STEPS}", "train.epochs=30", "checkpoint.keep=9")  # fmt: skip
TRIALS = {
    "plain": (),
    "other rank and rate": ("adapter.rank=3", "adapter.alpha=5", "optimizer.lr=3e-3", "schedule=linear"),
    "stopped": ("adapter.rank=16", "optimizer.lr=5e-3", "optimizer.beta1=0.8", "optimizer.beta2=0.95"),
    "other seed": ("train.adapter_seed=7", "optimizer.weight_decay=0.3", "schedule=constant", "train.max_grad_norm=0.1"),
    "rsLoRA": ("adapter=rslora", "adapter.rank=4", "schedule=wsd", "schedule.warmup_ratio=0.2", "train.max_grad_norm=null"),
    "dropout": ("adapter.dropout=0.2", "train.adapter_seed=3"),
    "loss": ("stage.label_smoothing=0.1", "adapter.dropout=0.1", "train.max_steps=20"),
    "sgd": ("optimizer=sgd", "optimizer.lr=0.05"),
}


def run_of(rows: str, cache: str, folder: Path, name: str, *more: str) -> TrainRun:
    return tiny_run(rows, cache, folder / name, *COMMON, *TRIALS[name], *more)


def prepared(run: TrainRun) -> str:
    return str(pipeline.prepare(run.model, run.data, run.resources, kind=run.stage.kind).folder)


def together(runs: Sequence[TrainRun], stopped: Mapping[int, int] | None = None) -> list[Any]:
    """stopped: the step at whose evaluation a run is ended."""
    heard: list[list[int]] = [[] for _ in runs]
    parts = [
        Part(
            run=run,
            sinks=[lambda record, number=number: heard[number].append(record["step"])],
            stops=lambda number=number: bool(heard[number]) and heard[number][-1] == (stopped or {}).get(number),
        )
        for number, run in enumerate(runs)
    ]
    outcomes = work_together(parts, prepared(runs[0]), None, device=CPU)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def alone(run: TrainRun) -> TrainOutcome:
    return work(run, prepared(run), None, device=CPU)


def numbers(folder: Path) -> list[dict[str, float]]:
    measured = ("tokens_per_s", "memory_gib", "mfu")
    return [
        {name: value for name, value in record.items() if name not in measured}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def assert_equal(mine: Path, expected: Path, *, tolerance: float = 1e-6) -> None:
    """Losses and all else that was logged, and the adapter."""
    for ours, theirs in zip(numbers(mine), numbers(expected), strict=True):
        for name, value in theirs.items():
            loosened = 10 if name == "grad_norm" else 1  # a sum over all of the adapter
            assert ours[name] == pytest.approx(value, rel=loosened * tolerance, abs=loosened * tolerance), (name, theirs["step"])
    adapters = [load_file(folder / "final" / "adapter_model.safetensors") for folder in (mine, expected)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], value, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def shared(chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    runs = [run_of(chat_rows, cache, folder, name) for name in TRIALS]
    outcomes = together(runs, {list(TRIALS).index("stopped"): EVERY})
    assert [outcome is None for outcome in outcomes] == [name == "stopped" for name in TRIALS]
    return folder


@pytest.mark.parametrize("name", [name for name in TRIALS if name not in ("plain", "stopped")])
def test_a_trial_in_a_bank_is_the_trial_alone(name: str, shared: Path, chat_rows: str, cache: str, tmp_path: Path) -> None:
    alone(run_of(chat_rows, cache, tmp_path, name))
    assert_equal(shared / name, tmp_path / name)


@pytest.mark.long
@pytest.mark.parametrize("name", ["stopped", "dropout"])
def test_a_trial_goes_on_alone_from_its_checkpoint(name: str, shared: Path, chat_rows: str, cache: str, tmp_path: Path) -> None:
    copy = tmp_path / "resumed"
    shutil.copytree(shared / name, copy / name)
    shutil.rmtree(copy / name / "final", ignore_errors=True)
    for step in range(2 * EVERY, STEPS + 1, EVERY):
        shutil.rmtree(copy / name / "checkpoints" / f"step-{step}", ignore_errors=True)
    result = api.train(run_of(chat_rows, cache, copy, name, "resume=must"))
    assert result.resumed_from == EVERY and result.summary.steps == STEPS
    alone(run_of(chat_rows, cache, tmp_path, name))
    assert_equal(copy / name, tmp_path / name)


def test_trials_that_differ_in_their_preference_loss_share_a_pass(cache: str, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    draw = random.Random(0)
    words = ["red", "green", "blue", "large", "small", "round"]
    with rows.open("w") as file:
        for _ in range(24):
            prompt, chosen, rejected = (" ".join(draw.choices(words, k=draw.randint(1, 8))) for _ in range(3))
            turns = [{"role": "user", "content": prompt}]
            answers = {
                side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
            }
            file.write(json.dumps({"messages": turns, **answers}) + "\n")
    more = (
        *COMMON,
        "stage=dpo",
        "data=chat_pairs",
        "train.max_steps=6",
        "train.eval_every_steps=3",
        "checkpoint.every_steps=null",
    )
    losses = {
        "sigmoid": ("adapter.rank=4",),
        "ipo": ("stage.loss=ipo", "stage.beta=0.5"),
        "bco": ("stage.loss=bco_pair", "adapter.rank=2", "adapter.dropout=0.1"),
    }
    runs = {name: tiny_run(str(rows), cache, tmp_path / "shared" / name, *more, *own) for name, own in losses.items()}
    together(list(runs.values()))
    for name, own in losses.items():
        alone(tiny_run(str(rows), cache, tmp_path / "alone" / name, *more, *own))
        assert_equal(tmp_path / "shared" / name, tmp_path / "alone" / name, tolerance=1e-5)

"""Every optimizer makes the same run under any strategy that supports it, skips nonfinite gradients, and resumes exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytune_llm import api
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.runs.worker import work
from tests.group import Group, metrics
from tests.invariant.test_same_run_everywhere import assert_same_run, elsewhere
from tests.runs import PowerCut, cut_at, tiny_run

# Muon rounds to bf16 between its products: at a higher rate, the last digit of a sum over workers would show in later steps.
SETTINGS = {
    "muon": ["optimizer=muon", "optimizer.lr=2e-4", "optimizer.adamw_lr_factor=5"],
    "sgd": ["optimizer=sgd", "optimizer.lr=0.1"],
    "sgd without momentum": ["optimizer=sgd", "optimizer.lr=0.3", "optimizer.momentum=0"],
}
ZERO = ["zero1", "zero2", "zero3"]
Runs = Callable[[str], TrainRun]


@pytest.fixture(scope="module")
def plain(chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With this optimizer, in one process."""
    done: dict[str, TrainRun] = {}

    def run(name: str) -> TrainRun:
        if name not in done:
            settings = ["adapter=none", "checkpoint.every_steps=3", "train.max_grad_norm=0.5", *SETTINGS[name]]
            done[name] = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("plain"), *settings)
            api.train(done[name])
            losses = [record["loss"] for record in metrics(done[name].output_dir) if "loss" in record]
            assert losses[-1] < losses[0] - 0.1, losses
        return done[name]

    return run


def store(run: TrainRun) -> str:
    return str(prepare(run.model, run.data, run.resources).store.folder)


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        *[("muon", strategy) for strategy in ("ddp", "fsdp", "fsdp strategy.reshard=grad_only", "fsdp strategy.shard_workers=1")],
        *[("sgd", strategy) for strategy in ("ddp", "fsdp", *ZERO)],
    ],
)
def test_two_workers_give_the_numbers_of_one(
    optimizer: str, strategy: str, plain: Runs, two_workers: Group, tmp_path: Path
) -> None:
    one = plain(optimizer)
    two = elsewhere(one, tmp_path, strategy=strategy, micro=2)
    two_workers.run(two, store(one))
    assert_same_run(one, two)


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_a_run_that_was_cut_off_goes_on_to_the_digit(optimizer: str, plain: Runs, tmp_path: Path) -> None:
    run = replace(plain(optimizer), output_dir=str(tmp_path))
    with pytest.raises(PowerCut):
        api.train(run, sinks=[cut_at(5)])
    assert api.train(run).resumed_from == 3
    kept = ("step", "loss", "grad_norm", "lr", "eval_loss")
    ours, theirs = (
        [{key: record.get(key) for key in kept} for record in metrics(folder)]
        for folder in (run.output_dir, plain(optimizer).output_dir)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [("muon", "fsdp"), *[("sgd", strategy) for strategy in ("fsdp", *ZERO)], ("sgd without momentum", "zero2")],
)
def test_sharded_state_goes_on_in_one_process(
    optimizer: str, strategy: str, plain: Runs, two_workers: Group, tmp_path: Path
) -> None:
    one = plain(optimizer)
    sharded = elsewhere(one, tmp_path, strategy=strategy)
    two_workers.run(sharded, store(one), stop_after=4)
    two_workers.run(sharded, store(one), stop_after=7)
    work(replace(one, output_dir=sharded.output_dir), store(one), None, device=torch.device("cpu"))
    assert_same_run(one, sharded)


@pytest.mark.parametrize(
    ("optimizer", "strategy"), [("muon", "ddp"), ("muon", "fsdp"), *[("sgd", strategy) for strategy in ("ddp", "fsdp", *ZERO)]]
)
def test_steps_with_a_broken_gradient_change_nothing(
    optimizer: str, strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    settings = [*SETTINGS[optimizer], f"strategy={strategy}", "resources=local", "adapter=none", "optimizer.lr=1e30"]
    fixed = ["schedule=constant", "schedule.warmup_ratio=0", "train.max_steps=3", "data.eval_fraction=0"]
    run = tiny_run(chat_rows, cache, tmp_path, *settings, *fixed)
    two_workers.run(run, store(run))
    assert [record.get("nonfinite_steps") for record in metrics(str(tmp_path)) if "loss" in record] == [None, 1, 2]

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
    "muon with bf16 moments": ["optimizer=muon", "optimizer.lr=1e-3", "optimizer.adamw_moments=bfloat16"],
    "adafactor": ["optimizer=adafactor", "optimizer.lr=3e-3"],
    "adam_mini": ["optimizer=adam_mini", "optimizer.lr=3e-3"],
    "adamw_8bit": ["optimizer=adamw_8bit", "optimizer.lr=3e-3"],
    "adamw_bf16": ["optimizer=adamw_bf16", "optimizer.lr=3e-3"],
    "apollo": ["optimizer=apollo", "optimizer.lr=3e-3", "optimizer.rank=8", "optimizer.scale=4", "optimizer.update_every=2"],
    "apollo_mini": ["optimizer=apollo_mini", "optimizer.lr=3e-3", "optimizer.scale=16", "optimizer.update_every=2"],
    "badam": ["optimizer=badam", "optimizer.lr=1e-2", "optimizer.switch_every=2", "optimizer.outside_layers=true"],
    "galore": ["optimizer=galore", "optimizer.lr=3e-3", "optimizer.rank=8", "optimizer.update_every=2"],
    "lion": ["optimizer=lion", "optimizer.lr=1e-3"],
    "schedule_free": ["optimizer=schedule_free", "optimizer.lr=1e-2", "schedule=constant"],
}
LAYERWISE = {"lomo": ["optimizer=lomo", "optimizer.lr=0.3"], "adalomo": ["optimizer=adalomo", "optimizer.lr=3e-2"]}
SHORT = ("muon", "sgd", "sgd without momentum", "badam")
EACH = [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in SETTINGS]
SHARDED = [
    pytest.param(name, "fsdp", marks=pytest.mark.long)
    for name in (
        "adafactor",
        "adam_mini",
        "adamw_8bit",
        "adamw_bf16",
        "apollo",
        "apollo_mini",
        "badam",
        "galore",
        "lion",
        "schedule_free",
    )
]
NEAR = {"galore": 1e-3, "adamw_bf16": 1e-2}
"""The largest relative difference between losses, for optimizers of which nothing else is compared: GaLore's singular vectors
amplify the rounding of sums over workers, and adamw_bf16 rounds each shard with random numbers of its own."""
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


def assert_near(one: TrainRun, other: TrainRun, optimizer: str) -> None:
    if optimizer not in NEAR:
        assert_same_run(one, other)
        return
    ours, theirs = ([record["loss"] for record in metrics(run.output_dir) if "loss" in record] for run in (one, other))
    assert len(ours) > 5 and ours == pytest.approx(theirs, rel=NEAR[optimizer])


def store(run: TrainRun) -> str:
    return str(prepare(run.model, run.data, run.resources).store.folder)


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        *[("muon", strategy) for strategy in ("ddp", "fsdp", "fsdp strategy.reshard=grad_only", "fsdp strategy.shard_workers=1")],
        *[("sgd", strategy) for strategy in ("ddp", "fsdp", *ZERO)],
        *SHARDED,
        *[pytest.param("lion", strategy, marks=pytest.mark.long) for strategy in ("ddp", "zero2", "zero3")],
        pytest.param("badam", "ddp", marks=pytest.mark.long),
    ],
)
def test_two_workers_give_the_numbers_of_one(
    optimizer: str, strategy: str, plain: Runs, two_workers: Group, tmp_path: Path
) -> None:
    one = plain(optimizer)
    two = elsewhere(one, tmp_path, strategy=strategy, micro=2)
    two_workers.run(two, store(one))
    assert_near(one, two, optimizer)


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [("adamw", "ddp"), *[(optimizer, "fsdp") for optimizer in ("adamw", "muon", "lomo", "adalomo")]],
)
def test_tensors_that_step_one_by_one_make_the_run_of_one_process(
    optimizer: str, strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    layerwise = ["optimizer.layerwise=true", "train.max_grad_norm=null", "train.micro_batch_size=8", "train.max_steps=7"]
    settings = ["adapter=none", *(SETTINGS | LAYERWISE).get(optimizer, []), *layerwise]
    one = tiny_run(chat_rows, cache, tmp_path / "one", *settings)
    api.train(one)
    two = elsewhere(one, tmp_path / "two", strategy=strategy, micro=4)
    two_workers.run(two, store(one))
    assert_near(one, two, optimizer)


@pytest.mark.parametrize("optimizer", EACH)
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
    [
        ("muon", "fsdp"),
        *[("sgd", strategy) for strategy in ("fsdp", *ZERO)],
        ("sgd without momentum", "zero2"),
        *SHARDED,
        pytest.param("lion", "zero2", marks=pytest.mark.long),
    ],
)
def test_sharded_state_goes_on_in_one_process(
    optimizer: str, strategy: str, plain: Runs, two_workers: Group, tmp_path: Path
) -> None:
    one = plain(optimizer)
    sharded = elsewhere(one, tmp_path, strategy=strategy)
    two_workers.run(sharded, store(one), stop_after=4)
    two_workers.run(sharded, store(one), stop_after=7)
    work(replace(one, output_dir=sharded.output_dir), store(one), None, device=torch.device("cpu"))
    assert_near(one, sharded, optimizer)


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [("muon", "ddp"), ("muon", "fsdp"), *[("sgd", strategy) for strategy in ("ddp", "fsdp", *ZERO)], *SHARDED],
)
def test_steps_with_a_broken_gradient_change_nothing(
    optimizer: str, strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    settings = [*SETTINGS[optimizer], f"strategy={strategy}", "resources=local", "adapter=none", "optimizer.lr=1e30"]
    fixed = ["schedule=constant", "schedule.warmup_ratio=0", "train.max_steps=3", "data.eval_fraction=0"]
    run = tiny_run(chat_rows, cache, tmp_path, *settings, *fixed)
    two_workers.run(run, store(run))
    assert [record.get("nonfinite_steps") for record in metrics(str(tmp_path)) if "loss" in record] == [None, 1, 2]

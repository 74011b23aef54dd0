"""A run that is interrupted anywhere and resumed equals an uninterrupted run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytune_llm import api, load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.loader import Loader
from raytune_llm.data.pipeline import prepare
from raytune_llm.runs import build
from raytune_llm.runs.stores import open_stores
from raytune_llm.runs.worker import work
from raytune_llm.train.checkpoint_files import complete_steps
from tests.group import Group, metrics
from tests.invariant.test_same_run_everywhere import SAMPLED, assert_same_run, lines, weights
from tests.runs import PowerCut, cut_at, tiny_run


@pytest.fixture(scope="module")
def whole(chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    overrides = ("checkpoint.every_steps=2", "train.eval_every_steps=3", "adapter.dropout=0.1", "train.global_batch_size=4")
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("whole"), *overrides, *SAMPLED)
    api.train(run)
    assert lines(run, "samples.jsonl")
    return run


@pytest.mark.parametrize("asynchronous", [False, True])
def test_cut_off_once_and_again_across_the_end_of_an_epoch(asynchronous: bool, whole: TrainRun, tmp_path: Path) -> None:
    run = replace(whole, output_dir=str(tmp_path), checkpoint=replace(whole.checkpoint, asynchronous=asynchronous))
    epoch = next(record["step"] for record in metrics(whole.output_dir) if record.get("epoch", 0) >= 1)
    for step in (3, epoch + 1):
        with pytest.raises(PowerCut):
            api.train(run, sinks=[cut_at(step)])
    result = api.train(run)
    assert result.resumed_from is not None and result.resumed_from >= epoch - 1
    assert_same_run(whole, run)


def test_log_windows_that_span_the_cut_are_whole(whole: TrainRun, tmp_path: Path) -> None:
    seldom = replace(whole, output_dir=str(tmp_path / "seldom"), train=replace(whole.train, log_every_steps=4))
    api.train(seldom)
    run = replace(seldom, output_dir=str(tmp_path / "cut"))
    with pytest.raises(PowerCut):
        api.train(run, sinks=[cut_at(8)])
    api.train(run)
    assert_same_run(seldom, run)


def test_from_two_workers_to_four_to_one(whole: TrainRun, two_workers: Group, four_workers: Group, tmp_path: Path) -> None:
    run = replace(whole, output_dir=str(tmp_path), resources=load_config("train", ["data.path=x"]).resources)
    # Dropout draws differ between worlds, since workers draw for themselves.
    run = replace(run, adapter=replace(run.adapter, dropout=0.0))
    plain = replace(run, output_dir=str(tmp_path / "plain"), resources=whole.resources)
    api.train(plain)
    run = replace(run, output_dir=str(tmp_path / "moved"))
    store = str(prepare(run.model, run.data, whole.resources).store.folder)
    for group, last in ((two_workers, 4), (four_workers, 7)):
        group.run(run, store, stop_after=last)
    work(run, store, None, device=torch.device("cpu"))
    assert_same_run(plain, run)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp strategy.reshard=grad_only", "zero1", "zero2", "zero3"])
def test_sharded_state_goes_on_in_one_process(strategy: str, whole: TrainRun, two_workers: Group, tmp_path: Path) -> None:
    """The last checkpoint is of a step with an evaluation, after which weights may lie gathered."""
    chosen = load_config("train", [*f"strategy={strategy}".split(), "data.path=x"])
    run = replace(whole, adapter=replace(whole.adapter, dropout=0.0))
    plain = replace(run, output_dir=str(tmp_path / "plain"))
    api.train(plain)
    store = str(prepare(run.model, run.data, run.resources).store.folder)
    sharded = replace(run, output_dir=str(tmp_path / "moved"), strategy=chosen.strategy, resources=chosen.resources)
    two_workers.run(sharded, store, stop_after=4)
    two_workers.run(sharded, store, stop_after=7)
    work(replace(run, output_dir=sharded.output_dir), store, None, device=torch.device("cpu"))
    assert_same_run(plain, sharded)


def test_the_order_of_samples_is_the_same_from_any_step_on(whole: TrainRun) -> None:
    store = str(prepare(whole.model, whole.data, whole.resources).store.folder)
    samples = open_stores(whole, store, None).train

    def seen(world: int, cursor: int) -> list[tuple[int, ...]]:
        loader = Loader(
            samples, micro_batch_size=1, global_batch_size=4, rank=world - 1, world_size=world, seed=whole.train.seed, pad_id=0
        )
        return [step.sample_ids for step in loader.epoch(1, cursor)]

    assert seen(1, 0)[2:] == seen(2, 8) == seen(4, 8)


@pytest.mark.parametrize("adapter", [["adapter=lora", "adapter.dropout=0.1"], ["adapter=freeze"]])
def test_frozen_layers_computed_once_give_what_those_computed_each_time_do_across_a_cut(
    adapter: list[str], chat_rows: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, over two epochs: the batches of the second are known, and after the cut they are not."""
    overrides = ("checkpoint.every_steps=2", "train.eval_every_steps=2", "train.global_batch_size=4")
    overrides = (*overrides, *adapter, "adapter.last_layers=1")
    chosen: list[str] = []

    def started(update: object) -> None:
        chosen.extend(getattr(update, "choices", ()))

    once = tiny_run(chat_rows, cache, tmp_path / "once", *overrides)
    with pytest.raises(PowerCut):
        api.train(once, sinks=[cut_at(5)], on_update=started)
    assert api.train(once).resumed_from == 4
    assert [line for line in chosen if line.startswith("layers: the first 1 of 2")]

    monkeypatch.setattr(build, "computes_first_once", lambda *_, **__: False)
    each_time = tiny_run(chat_rows, cache, tmp_path / "each_time", *overrides)
    del chosen[:]
    api.train(each_time, on_update=started)
    assert chosen and not [line for line in chosen if line.startswith("layers:")]
    figures = ("step", "loss", "grad_norm", "lr", "eval_loss")
    ours, theirs = ([[one.get(name) for name in figures] for one in metrics(run.output_dir)] for run in (once, each_time))
    assert ours == theirs and len(ours) > 12
    left, right = weights(once), weights(each_time)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_old_checkpoints_go_and_the_newest_stay(whole: TrainRun) -> None:
    steps = complete_steps(Path(whole.output_dir) / "checkpoints")
    assert len(steps) == whole.checkpoint.keep
    assert steps[-1] == metrics(whole.output_dir)[-1]["step"]

"""A run that trains while its data are still being tokenized has the numbers of one that finds them ready."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_llm import DataError, api, load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data import pipeline
from raytune_llm.data.readers import sources
from raytune_llm.data.store import MANIFEST
from tests.group import Group
from tests.invariant.test_same_run_everywhere import assert_same_run
from tests.runs import PowerCut, cut_at, tiny_run

STREAMING = (
    "data.streaming=true", "data.streaming_buffer_rows=13", "data.eval_fraction=0", "train.epochs=1", "train.max_steps=14",
    "train.global_batch_size=4", "checkpoint.every_steps=2", "adapter.dropout=0.1",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MIN_CHUNK_BYTES", 1500)
        yield


@pytest.fixture(scope="module")
def whole(chat_rows: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """Over the end of the first epoch."""
    run = tiny_run(chat_rows, str(tmp_path_factory.mktemp("stores")), tmp_path_factory.mktemp("whole"), *STREAMING)
    api.train(run)
    return run


def test_a_store_that_is_there_already_gives_the_same_run(whole: TrainRun, tmp_path: Path) -> None:
    pipeline.prepare(whole.model, whole.data, whole.resources)
    run = replace(whole, output_dir=str(tmp_path))
    api.train(run)
    assert_same_run(whole, run)


def test_cut_off_twice_while_the_store_grows(whole: TrainRun, tmp_path: Path) -> None:
    data = replace(whole.data, cache=str(tmp_path / "stores"))
    run = replace(whole, output_dir=str(tmp_path / "run"), data=data)
    for step in (3, 11):
        with pytest.raises(PowerCut):
            api.train(run, sinks=[cut_at(step)])
    assert api.train(run).resumed_from == 10
    assert_same_run(whole, run)


def test_two_workers_see_the_stream_of_one(whole: TrainRun, two_workers: Group, tmp_path: Path) -> None:
    resources = load_config("train", ["data.path=x"]).resources
    run = replace(whole, adapter=replace(whole.adapter, dropout=0.0))
    one, two = (replace(run, output_dir=str(tmp_path / name)) for name in ("one", "two"))
    api.train(one)
    store = pipeline.prepare(run.model, run.data, run.resources).store
    two_workers.run(replace(two, resources=resources), str(store.folder))
    assert_same_run(one, two)


def test_a_run_that_needs_little_leaves_the_rest_to_the_next(
    whole: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MIN_CHUNK_BYTES", 500)
    run = replace(
        whole,
        output_dir=str(tmp_path / "run"),
        data=replace(whole.data, cache=str(tmp_path / "stores")),
        train=replace(whole.train, max_steps=1),
    )
    api.train(run)
    shards = len(list((tmp_path / "stores").glob(".*.partial/shard-*")))
    done = len(list((tmp_path / "stores").glob(f"*/{MANIFEST}")))
    assert done or shards
    assert len(pipeline.prepare(run.model, run.data, run.resources).store) == 61


def test_bad_data_stop_the_run_and_say_why(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n' * 30)
    run = tiny_run(str(tmp_path / "rows.jsonl"), str(tmp_path), tmp_path / "run", *STREAMING)
    with pytest.raises(DataError, match="no row can be used"):
        api.train(run)

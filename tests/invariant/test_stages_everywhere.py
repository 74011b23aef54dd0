"""Preference stages and reward models give the same numbers whatever layout, strategy and world size, and after a power cut."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from tests.group import Group, metrics
from tests.runs import PowerCut, cut_at, tiny_run

RUNS = {
    "dpo": ["data=chat_pairs", "stage=dpo"],
    "dpo of the whole batch": ["data=chat_pairs", "stage=dpo", "stage.loss={bco_pair:0.5,aot:0.3,sft:0.2}"],
    "kto": ["data=chat_labeled", "stage=kto", "stage.sft_weight=0.1"],
    "reward": ["data=chat_pairs", "stage=reward"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same answers as pairs and with verdicts."""
    draw, words = random.Random(0), ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    folder = tmp_path_factory.mktemp("rows")
    files = {kind: (folder / f"{kind}.jsonl").open("w") for kind in ("pairs", "labeled")}
    for _ in range(40):
        prompt, good, bad = (" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(3))
        asked = [{"role": "user", "content": prompt}]
        chosen, rejected = ({"role": "assistant", "content": text} for text in (good, bad))
        files["pairs"].write(json.dumps({"messages": asked, "chosen": chosen, "rejected": rejected}) + "\n")
        is_good = draw.random() < 0.6
        files["labeled"].write(json.dumps({"messages": [*asked, chosen if is_good else rejected], "label": is_good}) + "\n")
    for file in files.values():
        file.close()
    return {kind: file.name for kind, file in files.items()}


@pytest.fixture(scope="module", params=RUNS)
def plain(
    request: pytest.FixtureRequest, answers: dict[str, str], cache: str, tmp_path_factory: pytest.TempPathFactory
) -> TrainRun:
    """One process, one pack at a time."""
    folder = tmp_path_factory.mktemp("plain")
    path = answers["labeled" if "kto" in request.param else "pairs"]
    run = tiny_run(path, cache, folder, *RUNS[request.param], "data.max_length=64", "train.global_batch_size=4")
    api.train(run)
    return run


def elsewhere(plain: TrainRun, folder: Path, *, strategy: str, micro: int) -> TrainRun:
    other = load_config("train", [f"strategy={strategy}", "data.path=x"])
    train = replace(plain.train, micro_batch_size=micro)
    return replace(plain, output_dir=str(folder), strategy=other.strategy, resources=other.resources, train=train)


def assert_same_numbers(run: TrainRun, other: TrainRun) -> None:
    ours, theirs = metrics(run.output_dir), metrics(other.output_dir)
    assert len(ours) == len(theirs) > 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_s", "memory_gib"}:
            assert math.isclose(a[key], b[key], rel_tol=2e-4, abs_tol=2e-5), (a["step"], key, a[key], b[key])
    if run.stage.name == "reward":
        assert_same_scores(run, other)


def assert_same_scores(run: TrainRun, other: TrainRun) -> None:
    """Of every held-out pair once, and as often right as the last evaluation said."""
    ours, theirs = (
        [json.loads(line) for line in (Path(one.output_dir) / "scores.jsonl").read_text().splitlines()] for one in (run, other)
    )
    assert [pair["row"] for pair in ours] == sorted({pair["row"] for pair in ours}) == [pair["row"] for pair in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert math.isclose(a["chosen"], b["chosen"], abs_tol=1e-4) and math.isclose(a["rejected"], b["rejected"], abs_tol=1e-4)
    last = [record for record in metrics(run.output_dir) if "eval_loss" in record][-1]
    right = sum(pair["chosen"] > pair["rejected"] for pair in ours) / len(ours)
    assert math.isclose(right, last["eval_accuracy"], abs_tol=1e-9)
    assert (Path(run.output_dir) / "scores.png").stat().st_size > 5_000


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_workers_give_the_numbers_of_one(strategy: str, plain: TrainRun, two_workers: Group, tmp_path: Path) -> None:
    run = elsewhere(plain, tmp_path, strategy=strategy, micro=2)
    store = prepare(plain.model, plain.data, plain.resources, kind=plain.stage.kind).store
    two_workers.run(run, str(store.folder))
    assert_same_numbers(plain, run)


def test_accumulation_does_not_show(plain: TrainRun, tmp_path: Path) -> None:
    run = replace(plain, output_dir=str(tmp_path), train=replace(plain.train, micro_batch_size=4))
    api.train(run)
    assert_same_numbers(plain, run)


def test_an_interruption_does_not_show(plain: TrainRun, tmp_path: Path) -> None:
    run = replace(plain, output_dir=str(tmp_path), checkpoint=replace(plain.checkpoint, every_steps=2))
    with pytest.raises(PowerCut):
        api.train(run, sinks=[cut_at(3)])
    assert api.train(run).resumed_from == 2
    assert_same_numbers(plain, run)


def test_every_row_weighs_the_same_packed_or_not(plain: TrainRun, tmp_path: Path) -> None:
    """With all rows in one step, packing changes only where they lie."""
    settings = {"train": replace(plain.train, max_steps=2, epochs=2, global_batch_size=1024)}
    runs = [
        replace(plain, output_dir=str(tmp_path / str(packing)), data=replace(plain.data, packing=packing), **settings)
        for packing in (True, False)
    ]
    for run in runs:
        api.train(run)
    first, second = (metrics(run.output_dir) for run in runs)
    for a, b in zip(first, second, strict=True):
        for key in a.keys() - {"tokens_per_s", "memory_gib"}:
            assert math.isclose(a[key], b[key], rel_tol=2e-4, abs_tol=2e-5), (a["step"], key, a[key], b[key])

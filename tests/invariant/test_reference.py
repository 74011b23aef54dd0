"""What the reference says is the same whether it is computed before the run or in each step, and wherever."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.config.overrides import CONF
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.errors import ConfigError, DataError
from raytune_llm.file_hash import sha256_of
from raytune_llm.report.updates import ReferencePass, RunStarted
from tests.group import Group, metrics
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pairs and labelled answers over small texts."""
    folder = tmp_path_factory.mktemp("rows")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    pairs, labeled = [], []
    for number in range(24):
        prompt = " ".join(words[number % 7 : number % 7 + 1 + number % 3])
        good, bad = " ".join(words[: 1 + number % 5]), " ".join(words[4 : 6 + number % 4])
        pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
        labeled.append({"prompt": prompt, "completion": good if number % 2 else bad, "label": number % 2 == 1})
    for name, found in (("dpo", pairs), ("kto", labeled)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in found))
    return {name: str(folder / f"{name}.jsonl") for name in ("dpo", "kto")}


DATA = {"dpo": "prompt_completion_pairs", "kto": "prompt_completion_labeled"}


def stage_run(rows: dict[str, str], cache: Any, output: Any, stage: str, *overrides: str) -> TrainRun:
    settings = (
        f"stage={stage}",
        f"data={DATA[stage]}",
        "train.epochs=1",
        "data.packing=false",
        "data.eval_fraction=0.2",
        "optimizer.lr=1e-2",
    )
    return tiny_run(rows[stage], str(cache), output, *settings, *overrides)


def losses(run: TrainRun) -> list[float]:
    return [record[key] for record in metrics(run.output_dir) for key in ("loss", "grad_norm", "eval_loss") if key in record]


def told(run: TrainRun) -> tuple[list[str], int]:
    """What a run says that it chose, and how often it told of a pass."""
    news: list[Any] = []
    api.train(run, on_update=news.append)
    choices = [choice for one in news if isinstance(one, RunStarted) for choice in one.choices if choice.startswith("reference")]
    return choices, sum(isinstance(one, ReferencePass) for one in news)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_precomputed_and_online_give_the_same_run(stage: str, adapter: str, rows: dict[str, str], tmp_path: Path) -> None:
    runs = [
        stage_run(rows, tmp_path / "cache", tmp_path / how, stage, f"adapter={adapter}", f"stage.reference={how}")
        for how in ("precomputed", "online")
    ]
    for run in runs:
        api.train(run)
    first, second = map(losses, runs)
    assert len(first) == len(second) > 3
    assert first == pytest.approx(second, rel=1e-4)
    assert math.isclose(first[0], math.log(2) if stage == "dpo" else 0.5, rel_tol=1e-5)


def test_a_second_run_reads_the_table_and_notices_one_that_does_not_fit(rows: dict[str, str], tmp_path: Path) -> None:
    run = stage_run(rows, tmp_path / "cache", tmp_path / "a", "dpo")
    (choice,), passes = told(run)
    assert "computed" in choice and passes > 2
    (choice,), passes = told(replace(run, output_dir=str(tmp_path / "b"), adapter=replace(run.adapter, rank=2)))
    assert "read from" in choice and passes <= 1
    (folder,) = (tmp_path / "cache").glob("reference-*")
    np.save(folder / "values.npy", np.load(folder / "values.npy") - 3)
    with pytest.raises(DataError, match=r"values\.npy: is missing or damaged"):
        api.train(replace(run, output_dir=str(tmp_path / "c")))
    key = json.loads((folder / "manifest.json").read_text())
    key["files"]["values.npy"] = sha256_of(folder / "values.npy")  # whole, and of other weights under the same name
    (folder / "manifest.json").write_text(json.dumps(key))
    with pytest.raises(DataError, match="rows differ"):
        api.train(replace(run, output_dir=str(tmp_path / "c")))


@pytest.mark.parametrize("how", ["precomputed", "online"])
def test_an_adapter_that_a_run_goes_on_from_is_in_the_reference(how: str, rows: dict[str, str], tmp_path: Path) -> None:
    first = stage_run(rows, tmp_path / "cache", tmp_path / "first", "dpo", "stage.reference=none")
    api.train(first)
    settings = (f"adapter.path={tmp_path / 'first/final'}", f"stage.reference={how}")
    second = stage_run(rows, tmp_path / "cache", tmp_path / "second", "dpo", *settings)
    api.train(second)
    assert losses(second)[0] == pytest.approx(math.log(2), rel=1e-5)
    named = stage_run(
        rows, tmp_path / "cache", tmp_path / "named", "dpo", f"stage.reference_adapter={tmp_path / 'first/final'}", *settings
    )
    api.train(named)
    assert losses(named) == pytest.approx(losses(second), rel=1e-4)


def test_the_recipe_of_two_runs_goes_on_from_the_first_and_is_held_against_it(rows: dict[str, str], tmp_path: Path) -> None:
    recipe = ("data=prompt_completion_pairs", "data.max_length=64", "data.packing=false", "train.epochs=1")
    first = tiny_run(
        str(CONF.parent / "examples" / "commands.jsonl"),
        str(tmp_path / "cache"),
        tmp_path / "first",
        *("+experiment=sft_smollm2", "data.max_samples=24", "train.eval_every_steps=null", "train.exact_match_rows=0"),
    )
    learned = api.train(first).final
    second, unlike = (
        tiny_run(
            rows["dpo"],
            str(tmp_path / "cache"),
            tmp_path / name,
            "+experiment=sft_then_dpo_smollm2",
            *recipe,
            f"adapter.path={path}",
        )
        for name, path in (("second", learned), ("unlike", "null"))
    )
    api.train(second)
    api.train(unlike)
    begun, fresh = (next(record for record in metrics(run.output_dir) if "loss" in record) for run in (second, unlike))
    assert begun["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert begun["rewards/margins"] == 0
    assert begun["logps/chosen"] != pytest.approx(fresh["logps/chosen"], rel=1e-3)


@pytest.mark.parametrize(
    ("strategy", "stage", "how"),
    [("ddp", "dpo", "online"), ("fsdp", "dpo", "precomputed"), ("fsdp", "kto", "online"), ("zero3", "dpo", "precomputed")],
)
def test_two_workers_give_the_numbers_of_one(
    strategy: str, stage: str, how: str, rows: dict[str, str], two_workers: Group, tmp_path: Path
) -> None:
    plain = stage_run(rows, tmp_path / "one", tmp_path / "plain", stage, f"stage.reference={how}")
    api.train(plain)
    chosen = load_config("train", [f"strategy={strategy}", "data.path=x"])
    run = stage_run(rows, tmp_path / "two", tmp_path / "spread", stage, f"stage.reference={how}", "train.micro_batch_size=2")
    store = prepare(run.model, run.data, run.resources, kind=run.stage.kind).store
    two_workers.run(replace(run, strategy=chosen.strategy, resources=chosen.resources), str(store.folder))
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


def test_the_first_step_of_a_partitioned_model_has_the_weights_that_the_reference_was_computed_with(
    rows: dict[str, str], two_workers: Group, tmp_path: Path
) -> None:
    """One pass alone was before it: DeepSpeed fetches ahead from the second one on."""
    chosen = load_config("train", ["strategy=zero3", "data.path=x"])
    few = ("data.max_samples=2", "data.eval_fraction=0", "train.global_batch_size=2")
    run = stage_run(rows, tmp_path / "cache", tmp_path / "run", "dpo", *few)
    store = prepare(run.model, run.data, run.resources, kind=run.stage.kind).store
    two_workers.run(replace(run, strategy=chosen.strategy, resources=chosen.resources), str(store.folder))
    assert losses(run)[0] == pytest.approx(math.log(2), rel=1e-5)


def test_partitioned_models_have_no_reference_in_each_step(rows: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage\.reference must be precomputed"):
        stage_run(rows, tmp_path, tmp_path, "dpo", "strategy=zero3", "resources=local", "stage.reference=online")

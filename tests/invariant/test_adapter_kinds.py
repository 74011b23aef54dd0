"""A run with any kind of adapter trains only the adapter, resumes exactly, is the same on two workers, and loads in PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from raytune_llm import api
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.models.adapters import OWN
from raytune_llm.runs.build import Builder
from tests.group import Group, metrics
from tests.invariant.test_same_run_everywhere import assert_same_run, elsewhere
from tests.invariant.test_saved_models_load_elsewhere import base_of, in_memory_logits
from tests.runs import PowerCut, cut_at, tiny_run

SETTINGS = {
    "rslora": ["adapter=rslora"],
    "lora_plus": ["adapter=lora_plus", "adapter.lr_ratio=4.0"],
    "dora": ["adapter=dora"],
    "pissa": ["adapter=pissa"],
    "pissa with all variants": ["adapter=pissa", "adapter.dora=true", "adapter.rslora=true", "adapter.lr_ratio=4.0"],
    "eva": ["adapter=eva"],
    "oft": ["adapter=oft"],
    "vera": ["adapter=vera", "adapter.rank=32", "optimizer.lr=5e-2"],
    "ia3": ["adapter=ia3", "adapter.targets=all-linear", "optimizer.lr=1e-1"],
}
"""Of the tiny model, which is to learn something in eight steps. LoRA has tests of its own for all of this, and LoftQ, over
quantized weights alone, in tests/unit/models/quantization."""
SAVED_AS = {"pissa": ["adapter=lora"], "pissa with all variants": ["adapter=dora", "adapter.rslora=true"]}
"""What continues it, if it is another kind."""


@pytest.fixture(scope="module", params=SETTINGS)
def run(request: pytest.FixtureRequest, chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    folder = tmp_path_factory.mktemp("kind") / request.param
    overrides = (
        "train.max_steps=8",
        "checkpoint.every_steps=2",
        "optimizer.lr=5e-3",
        *SETTINGS[request.param],
    )
    run = tiny_run(chat_rows, cache, folder, *overrides)
    api.train(run)
    return run


def kind_of(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["run"]


def test_every_tensor_of_the_adapter_learns_and_the_loss_falls(run: TrainRun, tmp_path: Path) -> None:
    losses = [record["loss"] for record in metrics(run.output_dir) if "loss" in record]
    assert losses[-1] < losses[0] - 0.05
    policy = Builder(run, base_of(run).config, torch.device("cpu")).build().policy  # type: ignore[arg-type]
    policy.adapters.save(OWN, tmp_path)
    begun, learned = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, Path(run.output_dir) / "final"))
    assert begun.keys() == learned.keys()
    assert not [name for name, value in begun.items() if torch.equal(learned[name], value)]


def test_an_interrupted_run_resumes_as_if_it_had_not_been(run: TrainRun, tmp_path: Path) -> None:
    cut = replace(run, output_dir=str(tmp_path))
    with pytest.raises(PowerCut):
        api.train(cut, sinks=[cut_at(5)])
    assert api.train(cut).resumed_from == 4
    assert_same_run(run, cut)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_two_workers_train_what_one_does(strategy: str, run: TrainRun, two_workers: Group, tmp_path: Path) -> None:
    spread = elsewhere(run, tmp_path, strategy=strategy, micro=2)
    two_workers.run(spread, str(prepare(run.model, run.data, run.resources).store.folder))
    assert_same_run(run, spread)


def test_zero3_partitions_what_is_called_and_no_more(run: TrainRun, two_workers: Group, tmp_path: Path) -> None:
    if run.adapter.refuses_partitioned is not None:
        pytest.skip("config/run.py refuses it by name")
    spread = elsewhere(run, tmp_path, strategy="zero3", micro=2)
    two_workers.run(spread, str(prepare(run.model, run.data, run.resources).store.folder))
    assert_same_run(run, spread)


def test_what_is_saved_is_what_was_in_memory_in_plain_peft_and_merged(run: TrainRun) -> None:
    ids = torch.arange(5, 60)
    model: Any = PeftModel.from_pretrained(base_of(run), Path(run.output_dir) / "final")
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
        assert torch.allclose(logits, in_memory_logits(run, ids), atol=1e-5)
        assert torch.allclose(model.merge_and_unload()(input_ids=ids[None]).logits[0, :-1], logits, atol=1e-5)


def test_packed_rows_are_trained_as_rows_by_themselves(run: TrainRun, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """All of an epoch's in one step, so that it has the same rows either way."""
    losses = []
    for packing in ("true", "false"):
        overrides = [
            *SETTINGS[kind_of(request)],
            f"data.packing={packing}",
            "train.max_steps=1",
            "train.global_batch_size=64",
        ]
        one = tiny_run(str(run.data.path), str(run.data.cache), tmp_path / packing, *overrides, "data.eval_fraction=0")
        losses.append(api.train(one).summary.loss_first)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_continued_adapter_of_any_kind_is_in_the_key_of_a_reference_table(
    run: TrainRun, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    final = Path(run.output_dir) / "final"
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "a", "chosen": "b" * (1 + n % 3), "rejected": "c"}) for n in range(16)))
    settings = ("stage=dpo", "data=prompt_completion_pairs", "data.packing=false", "data.eval_fraction=0", "train.max_steps=1")
    own = SETTINGS[kind_of(request)]
    saved_as = SAVED_AS.get(kind_of(request), own)
    for path in (final, None):
        name = "continued" if path else "new"
        pairs = tiny_run(
            str(rows), str(tmp_path / "cache"), tmp_path / name, *settings, *(saved_as if path else own),
            f"adapter.path={path or 'null'}", "optimizer.weight_decay=0.0",
        )  # fmt: skip
        assert api.train(pairs).summary.loss_first == pytest.approx(0.693147, rel=1e-4)
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 2, "one with what the adapter has learned, one without"


def test_the_files_of_a_model_are_measured_where_no_worker_has_it_whole(
    chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    """fsdp reads weights from their files; DoRA needs the lengths of their rows before."""
    full = tiny_run(chat_rows, cache, tmp_path / "base", "adapter=none", "train.max_steps=1")
    api.train(full)
    overrides = ["model=hub", f"model.path={tmp_path / 'base' / 'final'}", "adapter=dora", "train.max_steps=3"]
    plain = tiny_run(chat_rows, cache, tmp_path / "plain", *overrides)
    api.train(plain)
    spread = elsewhere(plain, tmp_path / "spread", strategy="fsdp")
    two_workers.run(spread, str(prepare(plain.model, plain.data, plain.resources).store.folder))
    losses = [[record["loss"] for record in metrics(one.output_dir) if "loss" in record] for one in (plain, spread)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3

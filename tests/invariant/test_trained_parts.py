"""A run that trains a part of a model's own weights leaves the rest as it was, and is the same run everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_llm import api
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from tests.group import Group
from tests.invariant.test_same_run_everywhere import assert_same_run, elsewhere
from tests.invariant.test_saved_models_load_elsewhere import base_of, in_memory_logits
from tests.runs import PowerCut, cut_at, tiny_run

PARTS = {
    "freeze": ["adapter.last_layers=1", "adapter.extra_modules=[norm]"],
    "llama_pro": ["adapter.new_layers=1"],
}
TRAINED = {"freeze": ("model.layers.1.", "model.norm."), "llama_pro": ("model.layers.2.",)}
BASE_LAYERS = {"freeze": {0: 0}, "llama_pro": {0: 0, 1: 1}}
"""Frozen layers by their numbers in the trained model, and in the base."""


@pytest.fixture(scope="module", params=list(PARTS))
def run(request: pytest.FixtureRequest, chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    folder = tmp_path_factory.mktemp("part") / request.param
    steps = ["train.max_steps=6", "checkpoint.every_steps=2", "optimizer.lr=5e-3"]
    run = tiny_run(chat_rows, cache, folder, f"adapter={request.param}", *PARTS[request.param], *steps)
    api.train(run)
    return run


def test_what_is_frozen_is_what_it_was_to_the_bit_and_all_the_rest_learns(run: TrainRun) -> None:
    kind, final = run.adapter.name, load_file(Path(run.output_dir) / "final" / "model.safetensors")
    base = base_of(run).state_dict()
    frozen = {name: value for name, value in final.items() if not name.startswith(TRAINED[kind])}
    assert 0 < len(frozen) < len(final)
    assert all(torch.equal(value, base[name]) for name, value in frozen.items())
    layers = {int(name.split(".")[2]) for name in frozen if ".layers." in name}
    assert layers == BASE_LAYERS[kind].keys()
    of_base = lambda name: name.replace(".layers.2.", ".layers.1.") if kind == "llama_pro" else name  # noqa: E731
    assert not [name for name in final.keys() - frozen.keys() if torch.equal(final[name], base[of_base(name)])]


def test_what_is_saved_is_what_was_in_memory_for_transformers(run: TrainRun) -> None:
    ids = torch.arange(5, 60)
    model = AutoModelForCausalLM.from_pretrained(Path(run.output_dir) / "final", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids[None]).logits[0, :-1], in_memory_logits(run, ids), atol=1e-5)


def test_an_interrupted_run_resumes_as_if_it_had_not_been(run: TrainRun, tmp_path: Path) -> None:
    cut = replace(run, output_dir=str(tmp_path))
    with pytest.raises(PowerCut):
        api.train(cut, sinks=[cut_at(5)])
    assert api.train(cut).resumed_from == 4
    assert_same_run(run, cut)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_workers_train_and_save_what_one_does(strategy: str, run: TrainRun, two_workers: Group, tmp_path: Path) -> None:
    spread = elsewhere(run, tmp_path, strategy=strategy, micro=2)
    two_workers.run(spread, str(prepare(run.model, run.data, run.resources).store.folder))
    assert_same_run(run, spread)
    ours, theirs = (load_file(Path(one.output_dir) / "final" / "model.safetensors") for one in (spread, run))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], value, atol=1e-4) for name, value in theirs.items())


def test_the_files_of_a_model_are_lengthened_and_frozen_where_no_worker_has_it_whole(
    chat_rows: str, cache: str, run: TrainRun, two_workers: Group, tmp_path: Path
) -> None:
    """fsdp reads weights from their files."""
    full = tiny_run(chat_rows, cache, tmp_path / "base", "adapter=none", "train.max_steps=1")
    api.train(full)
    kind = run.adapter.name
    of_files = ["model=hub", f"model.path={tmp_path / 'base' / 'final'}", f"adapter={kind}", *PARTS[kind], "train.max_steps=6"]
    plain = tiny_run(chat_rows, cache, tmp_path / "plain", *of_files)
    api.train(plain)
    spread = elsewhere(plain, tmp_path / "spread", strategy="fsdp")
    two_workers.run(spread, str(prepare(plain.model, plain.data, plain.resources).store.folder))
    assert_same_run(plain, spread)

"""What EVA begins as is a function of the run's data and seed alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raytune_llm.data.pipeline import prepare
from raytune_llm.errors import DataError
from raytune_llm.runs.first_inputs import begin_from_inputs
from raytune_llm.runs.setup import Setup, set_up
from tests.runs import tiny_run


def made(chat_rows: str, cache: str, folder: Path, *overrides: str) -> Setup:
    run = tiny_run(chat_rows, cache, folder, "adapter=eva", "adapter.rows=3", "data.eval_fraction=0", *overrides)
    store = str(prepare(run.model, run.data, run.resources).store.folder)
    return set_up(run, store, None, torch.device("cpu"), lambda update: None)


def begun(setup: Setup) -> dict[str, torch.Tensor]:
    begin_from_inputs(setup)
    return {name: value for name, value in setup.built.strategy.full_parameters() if "lora_A" in name}


def test_it_is_the_same_at_any_micro_batch_and_another_for_other_rows(chat_rows: str, cache: str, tmp_path: Path) -> None:
    first = begun(made(chat_rows, cache, tmp_path))
    for name, value in begun(made(chat_rows, cache, tmp_path, "train.micro_batch_size=2")).items():
        assert torch.equal(value, first[name])
        torch.testing.assert_close(value @ value.T, torch.eye(len(value)), atol=1e-3, rtol=0)
    other = begun(made(chat_rows, cache, tmp_path, "adapter.rows=2"))
    assert not any(torch.equal(value, first[name]) for name, value in other.items())


def test_rows_with_too_few_trained_tokens_are_refused(cache: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows.write_text(f"{json.dumps(row)}\n" * 8)
    setup = made(str(rows), cache, tmp_path, "adapter.rows=1", "data.packing=false")
    with pytest.raises(DataError, match=r"fewer trained tokens in 1 samples than twice adapter\.rank.* Raise adapter\.rows"):
        begin_from_inputs(setup)

"""What one worker of a run does, without what starts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raytune_llm.data.pipeline import prepare
from raytune_llm.report.updates import RunStarted
from raytune_llm.runs.worker import work
from tests.runs import tiny_run


def test_a_worker_tells_of_its_beginning_its_steps_and_its_records(chat_rows: str, cache: str, tmp_path: Path) -> None:
    run = tiny_run(chat_rows, cache, tmp_path, "train.max_steps=3", "checkpoint.every_steps=2", "train.eval_every_steps=3")
    store = str(prepare(run.model, run.data, run.resources).store.folder)
    records: list[Any] = []
    begun: list[Any] = []
    steps: list[int] = []
    told = {"sinks": [records.append], "on_update": begun.append, "on_step": steps.append}
    outcome = work(run, store, None, device=torch.device("cpu"), **told)
    assert (outcome.progress.step, outcome.world_size, steps) == (3, 1, [1, 2, 3])
    assert [(begin.first_step, begin.total_steps) for begin in begun if isinstance(begin, RunStarted)] == [(0, 3)]
    assert [record["step"] for record in records] == [1, 2, 3, 3] and "eval_loss" in records[-1]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in written] == [1, 2, 3, 3]
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()

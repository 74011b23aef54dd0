"""A disk that is full, wherever it shows: an error that names the folder, and a run that resumes once there is space."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raytune_llm import api, storage
from raytune_llm.errors import ResourceError, RunLost
from raytune_llm.report.metrics import JsonLines, read_metrics
from raytune_llm.runs.output import full_disk_explained, write_final
from raytune_llm.tune.events import SweepLog
from tests.group import metrics
from tests.limits import no_file_larger_than
from tests.runs import tiny_run


def test_a_disk_that_fills_up_while_metrics_are_written(chat_rows: str, cache: str, tmp_path: Path) -> None:
    run = tiny_run(chat_rows, cache, tmp_path / "o", "train.max_steps=6", "checkpoint.every_steps=2")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record: Mapping[str, Any]) -> None:
        if record["step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "o" / "metrics.jsonl").stat().st_size, unlimited[1]))

    try:
        with pytest.raises(ResourceError, match=r"o can't be written: .*resumes from the newest checkpoint"):
            api.train(run, sinks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert api.train(run).resumed_from == 4
    assert [record["step"] for record in metrics(run.output_dir) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_a_file_system_that_stays_away_ends_a_run_as_one_that_can_be_started_again(
    chat_rows: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0.0,))
    run = tiny_run(chat_rows, cache, tmp_path / "o", "train.max_steps=6", "checkpoint.every_steps=2")

    def gone(record: Mapping[str, Any]) -> None:
        if record["step"] == 5:
            raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(RunLost, match=r"o can't be read or written: Stale file handle.*resumes from the newest") as lost:
        api.train(run, sinks=[gone])
    assert lost.value.exit_code == 1
    assert api.train(run).resumed_from == 4


def test_a_record_is_whole_and_there_once_although_a_part_was_written_before_the_file_system_went_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl", from_step=0)
    file.write({"step": 1})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    class UntilItIsBack:
        def __iter__(self) -> Iterator[float]:
            yield 0.0
            assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"s'
            yield 0.0
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            yield 0.0

    monkeypatch.setattr(storage, "AWAY", {errno.EFBIG})  # which can be had here
    monkeypatch.setattr(storage, "PAUSES_S", UntilItIsBack())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 3, unlimited[1]))
        file.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    file.write({"step": 3})
    file.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_disk_that_is_full_at_the_start_leaves_the_settings_of_the_run_that_is_there(
    chat_rows: str, cache: str, tmp_path: Path
) -> None:
    run = tiny_run(chat_rows, cache, tmp_path / "o", "train.max_steps=2", "checkpoint.every_steps=1", "train.pause_at=0.5")
    api.train(run)
    before = (tmp_path / "o" / "run.yaml").read_bytes()
    with no_file_larger_than(1000), pytest.raises(ResourceError, match=r"o can't be written: .*resumes from the newest"):
        api.train(replace(run, train=replace(run.train, pause_at=None)))
    assert (tmp_path / "o" / "run.yaml").read_bytes() == before


def test_a_disk_that_fills_up_while_the_model_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    final = tmp_path / "final"

    def save(folder: Path) -> None:
        folder.mkdir()
        save_file({"weight": torch.zeros(1_000_000)}, folder / "model.safetensors")

    write_final(final, save, "before")
    with no_file_larger_than(100_000), pytest.raises(ResourceError, match="can't be written"), full_disk_explained(tmp_path):
        write_final(final, save, "after")
    assert (final / "README.md").read_text() == "before"


def test_a_disk_that_fills_up_while_a_sweep_logs_keeps_the_events_before(tmp_path: Path) -> None:
    log = SweepLog(tmp_path)
    log.append({"event": "sweep"})
    with no_file_larger_than(30), pytest.raises(ResourceError, match="can't be written"), full_disk_explained(tmp_path):
        log.append({"event": "began", "trial": 0})
    assert SweepLog(tmp_path).read() == [{"event": "sweep"}]

"""What a job's log tells: how far its run is, and the small files of its output folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from raytune_llm import api
from raytune_llm.cluster.job_log import read
from raytune_llm.commands import train
from raytune_llm.commands.submit import fetch
from raytune_llm.errors import ResourceError
from raytune_llm.report.events import EventLog
from raytune_llm.report.metrics import read_metrics
from raytune_llm.report.updates import RunStarted
from tests.runs import tiny_run


@pytest.fixture
def told() -> SimpleNamespace:
    lines: list[str] = ["a library's words"]
    return SimpleNamespace(lines=lines, log=EventLog(lines.append))


def test_a_run_that_lost_a_worker_has_each_step_once(told):
    told.log.update(RunStarted(total_steps=5, first_step=0, choices=()))
    for step in (1, 2, 3):
        told.log.record({"step": step, "loss": 9.0 - step})
    told.log.update(RunStarted(total_steps=5, first_step=2, choices=()))
    assert read(told.lines).step == 2
    told.log.record({"step": 3, "loss": 0.5})
    told.log.record({"step": 3, "eval_loss": 0.7})
    log = read(told.lines)
    assert [record["step"] for record in log.records] == [1, 2, 3, 3]
    assert (log.step, log.total_steps, log.loss) == (3, 5, 0.5)


def test_the_files_are_those_that_the_run_wrote(told, chat_rows, cache, tmp_path):
    settings = ["train.max_steps=3", "train.eval_every_steps=3", "train.sample_rows=1", "train.max_new_tokens=4"]
    run = tiny_run(chat_rows, cache, tmp_path / "there", *settings)
    told.log.run(run.name, "", "name: run\n")
    result = api.train(run, sinks=[told.log.record], on_update=told.log.update, on_samples=told.log.samples)
    told.log.done(train._done(run, result))
    here = tmp_path / "here"
    written = read(told.lines).write(here)
    assert written == ["run.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "summary.json"]
    for name in ("metrics.jsonl", "samples.jsonl", "summary.json"):
        assert (here / name).read_bytes() == (Path(run.output_dir) / name).read_bytes()
    assert read_metrics(here / "metrics.jsonl")[-1]["step"] == 3


def test_a_log_of_another_program_tells_nothing(tmp_path):
    log = read(["hello", '{"a": 1}'])
    assert log.step is log.loss is log.left_s is None
    assert log.write(tmp_path) == []


def test_results_that_can_t_be_written_here_are_an_error_that_says_how_to_fetch_them(told, tmp_path):
    told.log.run("mine", "", "name: run\n")
    (tmp_path / "file").touch()
    with pytest.raises(
        ResourceError, match=r"file/mine-1 can't be written \(Not a directory\).*jobs fetch mine-1` with submit\.results"
    ):
        fetch(Console(), read(told.lines), "mine-1", tmp_path / "file")
    assert fetch(Console(), read(told.lines), "mine-1", tmp_path) and (tmp_path / "mine-1" / "run.yaml").exists()

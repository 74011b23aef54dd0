"""What a job's log tells: how far its run is, and the small files of its output folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from raytune_llm import api, load_config
from raytune_llm.cluster.job_log import read
from raytune_llm.cluster.jobs import Job
from raytune_llm.cluster.submit import follow
from raytune_llm.commands import train
from raytune_llm.commands.jobs import _list
from raytune_llm.commands.submit import fetch
from raytune_llm.errors import ResourceError
from raytune_llm.report.display import Display
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


@pytest.mark.parametrize(
    "event",
    [
        {"event": "step"},
        {"event": "step", "step": 3, "loss": "low", "total_steps": 9},
        {"event": "step", "step": "x", "total_steps": None},
        {"event": "begin", "first_step": None, "total_steps": 3},
        {"event": "samples", "samples": [{"question": "?"}]},
        {"event": "files", "files": {"trials.csv": 3}},
        {"event": "done", "summary": {"other": 1}},
        {"event": "run", "settings": 3},
        {"event": [1]},
    ],
)
def test_events_of_another_version_are_left_out_and_shown_as_they_are(event, tmp_path):
    line = json.dumps({**event, "time": 1.0})
    log = read([line])
    assert log.step is log.loss is log.done is None and log.write(tmp_path) == []
    told: list[str] = []
    follow(SimpleNamespace(lines=lambda job, tell: [line]), "job", Display(Console(quiet=True)), told.append)  # pyright: ignore
    assert told == [line] or event["event"] == [1]


def test_results_that_can_t_be_written_here_are_an_error_that_says_how_to_fetch_them(told, tmp_path):
    told.log.run("mine", "", "name: run\n")
    (tmp_path / "file").touch()
    with pytest.raises(
        ResourceError, match=r"file/mine-1 can't be written \(Not a directory\).*jobs fetch mine-1` with submit\.results"
    ):
        fetch(Console(), read(told.lines), "mine-1", tmp_path / "file")
    assert fetch(Console(), read(told.lines), "mine-1", tmp_path) and (tmp_path / "mine-1" / "run.yaml").exists()


def test_names_of_jobs_are_listed_whole_however_narrow_the_terminal_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "a_run_whose_name_is_long-a1b2c3"
    job = Job(id=name, run=name, status="RUNNING", message="", exit_code=None, started=None, ended=None, output_dir=None)
    of_one: Any = SimpleNamespace(all=lambda: [job], log=lambda name: "", address="http://head:8265")
    assert _list(Console(), of_one, load_config("jobs", [])) == 0
    assert capsys.readouterr().out.count(name) == 2

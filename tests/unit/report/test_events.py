"""A run's events say what its terminal says."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from raytune_llm import api
from raytune_llm.commands import train
from raytune_llm.report.display import Display
from raytune_llm.report.events import EventLog, done_of, event_of, record_of, show
from raytune_llm.report.metrics import read_metrics
from raytune_llm.report.updates import Notice, RunStarted
from tests.runs import tiny_run


def printed(display_on) -> str:
    file = io.StringIO()
    display_on(Display(Console(file=file, width=160)))
    return file.getvalue()


@pytest.fixture(scope="module")
def told(chat_rows, cache, tmp_path_factory) -> tuple[str, list[str], str]:
    """What a terminal shows of a run, its events, and its output folder."""
    settings = ["train.max_steps=4", "train.eval_every_steps=2", "train.sample_rows=1", "train.max_new_tokens=4"]
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("told"), *settings)
    file, lines = io.StringIO(), []
    faces = (Display(Console(file=file, width=160)), EventLog(lines.append))
    for face in faces:
        face.run(run.name, "sft", "name: run")
    result = api.train(
        run,
        sinks=[face.record for face in faces],
        on_update=lambda update: [face.update(update) for face in faces],
        on_samples=lambda samples: [face.samples(samples) for face in faces],
        on_progress=lambda done, total: [face.rows(done, total) for face in faces],
    )
    for face in faces:
        face.close()
        face.done(train._done(run, result))
    return file.getvalue(), lines, run.output_dir


def test_who_reads_the_events_sees_what_the_run_showed(told):
    shown, lines, _ = told

    def replay(display: Display) -> None:
        for line in lines:
            show(event_of(line) or {}, display)

    without_time = re.compile(r"  \d:\d\d:\d\d left")
    assert "step 4/4" in shown and "sft" in shown and "summary" not in shown
    assert without_time.sub("", printed(replay)) == without_time.sub("", shown)


def test_the_records_of_the_events_are_those_of_metrics_jsonl(told):
    _, lines, folder = told
    events = [event_of(line) or {} for line in lines]
    assert [record_of(event) for event in events if event["event"] == "step"] == read_metrics(Path(folder) / "metrics.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert steps[-1]["left_s"] == 0 and {event["total_steps"] for event in steps} == {4} and {e["rank"] for e in steps} == {0}
    assert done_of(events[-1]).summary.steps == 4


def test_what_is_no_number_stays_so():
    lines: list[str] = []
    log = EventLog(lines.append)
    log.update(RunStarted(total_steps=3, first_step=0, choices=("one",)))
    log.record({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    json.loads(lines[-1], parse_constant=pytest.fail)
    record = record_of(event_of(lines[-1]) or {})
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf


def test_a_notice_has_the_step_and_the_workers_that_it_is_about():
    lines: list[str] = []
    log = EventLog(lines.append)
    log.update(Notice(text="waiting"))
    log.update(RunStarted(total_steps=30, first_step=20, choices=()))
    log.update(Notice(text="slow"))
    log.record({"step": 21, "loss": 1.0})
    log.update(Notice(text="worker 3 died", ranks=(3,)))
    notices = [event for line in lines if (event := event_of(line) or {})["event"] == "notice"]
    assert [(event.get("step"), event.get("ranks")) for event in notices] == [(None, None), (20, None), (21, [3])]


@pytest.mark.parametrize("line", ["a library's words", '{"event": "step"', '{"event": 3}', '{"eventual": 1, "time": 2}', ""])
def test_other_lines_are_no_events(line):
    assert event_of(line) is None


def test_the_command_prints_events_where_it_is_asked_to(chat_rows, cache, tmp_path, capsys):
    train.main(tiny_run(chat_rows, cache, tmp_path, "train.max_steps=1", "log_format=json"))
    kinds = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert kinds[0] == "run" and kinds[-1] == "done" and "step" in kinds

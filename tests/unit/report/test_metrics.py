from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest

from raytune_llm.errors import DataError, ResourceError
from raytune_llm.report.metrics import Report, Summary, WallTime, read_metrics, write_summary

SUMMARY = Summary(
    loss_first=2.5,
    loss_last=0.5,
    exact_match_before=0.0,
    exact_match_after=None,
    steps=40,
    tokens=4096,
    tokens_per_s=400.0,
    mfu=None,
    peak_memory_gib=1.5,
    world_size=2,
    wall_s=WallTime(start=1.0, prepare=2.0, load=3.0, train=4.0, save=5.0, total=15.5),
)


def steps_of(folder):
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def log_steps(folder, steps, *, from_step):
    with Report(folder, from_step=from_step) as report:
        for step in steps:
            report.log({"step": step, "loss": 1 / step})


def test_a_logged_record_is_on_disk_before_the_report_is_closed(tmp_path):
    report = Report(tmp_path, from_step=0)
    report.log({"step": 1, "loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    report.close()


def test_a_file_that_is_removed_while_a_run_writes_to_it_is_named(tmp_path):
    report = Report(tmp_path, from_step=0)
    report.log({"step": 1, "loss": 2.0})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ResourceError, match=r"metrics\.jsonl was removed while the run wrote to it"):
        report.log({"step": 2, "loss": 2.0})


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    log_steps(tmp_path, [1, 2], from_step=0)
    log_steps(tmp_path, [1], from_step=0)
    assert steps_of(tmp_path) == [1]


def test_a_resumed_run_never_doubles_steps(tmp_path):
    log_steps(tmp_path, [1, 2, 3, 4], from_step=0)
    log_steps(tmp_path, [3, 4, 5], from_step=2)
    log_steps(tmp_path, [5, 6], from_step=4)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_run_resumes_over_a_line_that_a_crash_cut_short(tmp_path):
    log_steps(tmp_path, [1, 2, 3], from_step=0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert steps_of(tmp_path) == [1, 2]
    log_steps(tmp_path, [3], from_step=2)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_cut_number_is_not_taken_for_a_whole_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert steps_of(tmp_path) == [1]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="row 2"):
        read_metrics(path)


def test_resuming_without_a_metrics_file_starts_one(tmp_path):
    log_steps(tmp_path / "new", [8], from_step=7)
    assert steps_of(tmp_path / "new") == [8]


def test_non_finite_values_stay_valid_json_and_come_back(tmp_path):
    with Report(tmp_path, from_step=0) as report:
        report.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "lr": "-Infinity"}
    [record] = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"])
    assert (record["grad_norm"], record["lr"]) == (math.inf, -math.inf)


def test_values_that_are_none_are_left_out_for_file_and_sinks(tmp_path):
    seen = []
    with Report(tmp_path, from_step=0, sinks=[seen.append]) as report:
        report.log({"step": 1, "loss": 2.0, "mfu": None})
    assert seen == read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_keys_keep_their_order(tmp_path):
    with Report(tmp_path, from_step=0) as report:
        report.log({"step": 1, "epoch": 0.5, "loss": 1.0, "accuracy": 0.5})
    assert list(read_metrics(tmp_path / "metrics.jsonl")[0]) == ["step", "epoch", "loss", "accuracy"]


def test_the_summary_is_written_whole_with_every_field(tmp_path):
    write_summary(tmp_path / "summary.json", SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == asdict(SUMMARY)
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_diverged_run_still_has_a_summary_that_every_parser_reads(tmp_path):
    write_summary(tmp_path / "summary.json", replace(SUMMARY, loss_last=math.nan))
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)["loss_last"] == "NaN"

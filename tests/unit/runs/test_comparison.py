from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_llm.__main__ import main
from raytune_llm.runs.comparison import compare


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """One that has ended, and one that is at its third step."""
    for name, lr in (("a", 0.1), ("b", 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.yaml").write_text(f"name: {name}\nmodel:\n  path: same\noptimizer:\n  lr: {lr}\n")
        records = [{"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.0 + lr}, {"step": 3, "loss": 1.2}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        samples = [{"step": n, "source": "", "row": 4, "prompt": "hi", "reference": "ho", "answer": f"{name}{n}"} for n in (1, 2)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples) + '{"step": 3, "sou')
    summary = {"loss_last": 1.2, "world_size": 2, "wall_s": {"total": 1800.0}}
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    return [str(tmp_path / name) for name in "ab"]


def test_settings_that_differ_figures_and_newest_answers_stand_side_by_side(runs):
    found = compare(runs)
    assert list(found.names) == ["a", "b"]
    assert dict(found.settings) == {"optimizer.lr": [0.1, 0.2]}
    assert found.figures["eval_loss"] == [1.1, 1.2]
    assert found.figures["worker hours"] == [1.0, None]
    assert [(one.prompt, list(one.answers)) for one in found.samples] == [("hi", ["a2", "b2"])]


def test_compare_takes_folders_as_words_and_writes_a_page(runs, tmp_path, capsys):
    page = tmp_path / "runs.html"
    assert main(["compare", *runs, f"page={page}"]) == 0
    out = capsys.readouterr().out
    assert "optimizer.lr" in out and "0.2" in out
    assert "optimizer.lr" in page.read_text() and "<html" in page.read_text()


def test_trials_of_a_sweep_lie_in_folders_with_an_equals_sign(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "a").rename(tmp_path / "000_lr=0.1")
    assert main(["compare", str(tmp_path / "000_lr=0.1"), runs[1]]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "000_lr=0.1", "b"]) == 0
    assert "000_lr=0.1" in capsys.readouterr().out


def test_lines_that_are_no_text_are_left_out(runs, tmp_path):
    (tmp_path / "a" / "metrics.jsonl").write_bytes(b'{"step": 2, "eval_loss": 1.1}\n\xff\xfe\n')
    assert compare(runs).figures["eval_loss"] == [1.1, 1.2]


@pytest.mark.parametrize("text", ["", "[]", '{"loss_last": '])
def test_a_damaged_summary_is_said(text, runs, tmp_path, capsys):
    (tmp_path / "a" / "summary.json").write_text(text)
    assert main(["compare", *runs]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a/summary.json can't be read: its figures are left out" in said and "b/summary.json" not in said


def test_a_folder_without_a_run_is_left_out_and_said(runs, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    (tmp_path / "notes.txt").touch()
    assert main(["compare", str(tmp_path / "begun"), *runs, str(tmp_path / "notes.txt")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "begun is left out: it has no run.yaml" in said and "notes.txt is left out" in said
    assert list(compare([str(tmp_path / "begun"), *runs]).names) == ["a", "b"]


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "runs must have an output folder of a run" in capsys.readouterr().err
    assert main(["compare", *runs, str(tmp_path / "no")]) == 2
    assert "runs must be output folders that are there" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "runs must name" in capsys.readouterr().err

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raytune_llm.__main__ import main
from raytune_llm.config.load import load_config
from raytune_llm.config.plain import to_yaml
from raytune_llm.runs.comparison import compare


def settings_of(name: str, lr: float, data: str = "rows.json") -> str:
    same = "model: {path: same}\nstage: {name: sft}\nadapter: {name: lora}\n"
    return f"name: {name}\n{same}data: {{path: {data}}}\noptimizer: {{lr: {lr}}}\n"


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """One that has ended, and one that is at its third step."""
    for name, lr in (("a", 0.1), ("b", 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.yaml").write_text(settings_of(name, lr))
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


def test_a_link_that_leads_nowhere_or_round_is_left_out(runs, tmp_path):
    links = [tmp_path / "gone", tmp_path / "round"]
    links[0].symlink_to("nowhere")
    links[1].symlink_to("round")
    found = compare([*map(str, links), *runs])
    assert list(found.names) == ["a", "b"]
    assert found.notices == [f"{link} is left out: it has no run.yaml" for link in links]


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "runs must have an output folder of a run" in capsys.readouterr().err
    assert main(["compare", *runs, str(tmp_path / "no")]) == 2
    assert "There is no such folder" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "runs must name" in capsys.readouterr().err


def test_what_an_evaluation_wrote_is_no_run(runs, tmp_path):
    evaluation = tmp_path / "mmlu"
    evaluation.mkdir()
    words = ["model.path=some/model", "evaluate.tasks=[mmlu_test]", "evaluate.data=there", "output_dir=out"]
    (evaluation / "run.yaml").write_text(to_yaml(load_config("evaluate", words)))
    found = compare([*runs, str(evaluation)])
    assert list(found.names) == ["a", "b"] and "optimizer.lr" in found.settings and len(found.samples) == 1
    assert found.notices == [f"{evaluation} is left out: its run.yaml is not one of a training run"]


@pytest.mark.parametrize("text", ["", "a: [", "[1]", "stage: 3\nadapter: {name: lora}"])
def test_a_damaged_run_is_left_out_and_said(text, runs, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.yaml").write_text(text)
    assert main(["compare", *runs, str(tmp_path / "broken")]) == 0
    assert "broken is left out: its run.yaml" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("text", ["[]", "{}", "null", "3", '"eval_loss"', '{"row": [], "source": "", "prompt": 1}', "{"])
@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_line_that_is_no_record_is_passed_over(file, text, runs, tmp_path):
    expected = compare(runs)
    lines = (tmp_path / "a" / file).read_text()
    (tmp_path / "a" / file).write_text(f"{text}\n{lines}\n{text}\n")
    assert compare(runs) == expected


def test_figures_that_are_no_numbers_are_shown_as_they_are(runs, tmp_path):
    (tmp_path / "a" / "summary.json").write_text('{"wall_s": {"total": "NaN"}, "world_size": 2}')
    assert compare(runs).figures["wall_s.total"] == ["NaN", None] and "worker hours" not in compare(runs).figures


def test_a_page_that_cannot_be_written_is_refused(runs, tmp_path, capsys):
    for page in (tmp_path, tmp_path / "no" / "page.html", tmp_path / ("x" * 300)):
        assert main(["compare", *runs, f"page={page}"]) == 2
        assert "page must be a file that can be written" in capsys.readouterr().err


def test_a_page_replaces_a_page_but_no_other_file(runs, tmp_path, capsys):
    kept, page = tmp_path / "kept", tmp_path / "runs.html"
    kept.write_text("mine")
    assert main(["compare", *runs, f"page={kept}"]) == 2
    assert "page must be a new file" in capsys.readouterr().err and kept.read_text() == "mine"
    assert [main(["compare", *runs, f"page={page}"]) for _ in range(2)] == [0, 0]


def test_a_page_is_as_wide_as_its_runs_need(runs, tmp_path):
    many = []
    for number in range(40):
        shutil.copytree(tmp_path / "a", tmp_path / f"a_long_name_{number}")
        (tmp_path / f"a_long_name_{number}" / "run.yaml").write_text(settings_of("a", number))
        many.append(str(tmp_path / f"a_long_name_{number}"))
    assert main(["compare", *many, f"page={tmp_path / 'runs.html'}"]) == 0
    assert all(Path(folder).name in (tmp_path / "runs.html").read_text() for folder in many)


def test_names_get_as_many_parents_as_tell_them_apart(runs, tmp_path):
    folders = [tmp_path / place / "seed" / "final" for place in ("one", "two")]
    for folder in folders:
        shutil.copytree(tmp_path / "a", folder)
    assert list(compare([*map(str, folders), runs[1]]).names) == ["one/seed/final", "two/seed/final", "b"]
    assert list(compare([runs[0], runs[0], runs[1]]).names) == ["a", "b"]


def test_answers_to_other_questions_do_not_stand_side_by_side(runs, tmp_path):
    (tmp_path / "b" / "run.yaml").write_text(settings_of("b", 0.2, data="others.json"))
    assert [one.prompt for one in compare(runs).samples] == ["hi"]  # moved data: the question is the same
    samples = (tmp_path / "b" / "samples.jsonl").read_text()
    (tmp_path / "b" / "samples.jsonl").write_text(samples.replace('"hi"', '"other"'))
    assert compare(runs).samples == []
    (tmp_path / "b" / "run.yaml").write_text(settings_of("b", 0.2))
    assert len(compare(runs).samples) == 1  # another template's prompt of the same row
    (tmp_path / "b" / "samples.jsonl").write_text(samples.replace('"ho"', '"another"'))
    assert compare(runs).samples == []


def test_a_run_without_evaluations_shows_its_last_step(runs, tmp_path):
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5, "tokens_per_s": 90.0}\n')
    figures = compare(runs).figures
    assert figures["loss_last"] == [1.2, 0.5] and figures["steps"] == [None, 7] and figures["tokens_per_s"] == [None, 90.0]

"""The command line, in this process."""

from __future__ import annotations

import os
import shlex

import pytest

from raytune_llm.__main__ import VERBS, main
from raytune_llm.config.command_line import load, parse
from raytune_llm.config.help import EXAMPLES


def said(capsys, *argv):
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_shows_verbs_groups_experiments_and_settings(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0
    for word in ("prepare", "doctor", "strategy", "zero3", "sft_smollm2", "optimizer.lr: 0.0002", "--cfg job"):
        assert word in out


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_is_about_this_verb_only(capsys, verb):
    code, out, _ = said(capsys, verb, "--help")
    assert code == 0
    assert out.startswith(f"{verb}: {VERBS[verb]}")
    assert (f"Settings of {verb}" in out) == (verb != "doctor")
    assert ("--dry-run" in out) == (verb == "tune")
    assert ("  optimizer     " in out) == (verb in ("train", "plan", "tune", "submit"))


@pytest.mark.parametrize("example", [line for lines in EXAMPLES.values() for line in lines if "outputs/mine" not in line])
def test_examples_of_the_help_are_commands(example):
    verb, *words = shlex.split(example)
    if verb not in VERBS:
        verb, words = "train", [verb, *words]
    if words[:1] != ["resume"]:  # it reads the sweep's folder
        load(parse(verb, words))


def test_each_verb_has_an_example():
    assert list(EXAMPLES) == list(VERBS)


def test_a_wrong_verb_is_named_with_the_right_one(capsys):
    code, _, err = said(capsys, "trian")
    assert code == 2
    assert "Did you mean train?" in err


def test_a_mistake_ends_with_code_2_and_no_traceback(capsys):
    code, _, err = said(capsys, "train", "optimizer.lrr=1")
    assert code == 2
    assert err == "error: optimizer.lrr is no setting. Did you mean optimizer.lr?\n"


def test_a_missing_file_ends_with_code_2(capsys, tmp_path):
    code, _, err = said(
        capsys, "model=tiny_random", "resources=inline", f"data.path={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path}"
    )
    assert code == 2
    assert "rows.jsonl" in err


def test_cfg_job_prints_the_composed_config(capsys):
    code, out, _ = said(capsys, "--cfg", "job", "+experiment=sft_smollm2")
    assert code == 0
    assert "name: sft_smollm2" in out
    assert "rank: 16" in out
    code, out, _ = said(capsys, "--cfg", "job", "model.config.rope_theta=5.0")
    assert code == 0 and "rope_theta: 5.0" in out


def test_multirun_gives_each_job_a_folder(capsys, tmp_path, chat_rows, cache):
    code, *_ = said(
        capsys, "-m", "model=tiny_random", "resources=inline", "tracking=none", f"data.path={chat_rows}",
        f"data.cache={cache}", "data.max_length=256", "train.max_steps=1", "train.precision=fp32",
        f"output_dir={tmp_path / 'sweep'}", "optimizer.lr=1e-3,1e-4",
    )  # fmt: skip
    assert code == 0
    made = sorted(path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json"))
    assert len(made) == 2
    assert all("optimizer.lr" in name for name in made)


@pytest.mark.parametrize(("own", "spins"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)])
def test_threads_spin_briefly_unless_the_user_says_otherwise(own, spins, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    main(["--help"])
    assert os.environ.get("GOMP_SPINCOUNT") == spins

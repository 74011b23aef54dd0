"""Sweeps that wait: trials that resume come to the numbers of trials that never waited."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from io import StringIO

import pytest
from rich.console import Console

from raytune_llm import ConfigError, api, load_config, load_sweep
from raytune_llm.commands.tune import _print_paused
from raytune_llm.config.sweep import Chosen, command_of, load_paused
from raytune_llm.report.metrics import history, read_metrics
from raytune_llm.runs.output import adopt
from raytune_llm.tune.metric import metric_of
from raytune_llm.tune.run import check_choice
from raytune_llm.tune.study import Study
from tests.unit.tune.test_run import words
from tests.unit.tune.test_study import loss_of

GRID = ("optimizer.lr=1e-3,1e-2,1e-9", "tune=grid", "train.max_steps=4")


def records(folder):
    """What depends on no clock."""
    found = read_metrics(folder / "metrics.jsonl")
    return [(record["step"], record.get("loss"), record.get("eval_loss"), record.get("lr")) for record in found]


@pytest.fixture(scope="module")
def paused(chat_rows, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paused")
    return folder, api.tune(load_sweep(words(chat_rows, cache, folder, *GRID, "tune.pause_at=0.5", "resume=never")))


def test_all_trials_wait_at_their_checkpoints(paused):
    folder, result = paused
    assert result.paused and result.best.point == {"optimizer.lr": 1e-2}
    assert [(trial.state, trial.step) for trial in result.study.trials] == [("paused", 2)] * 3
    assert len(list(folder.glob("trials/*/checkpoints/step-2/COMPLETE"))) == 3 and not list(folder.glob("trials/*/final"))


def test_the_chosen_ones_end_as_if_they_had_never_waited(paused, chat_rows, cache, tmp_path, monkeypatch):
    folder, before = paused
    numbers = [trial.number for trial in before.study.paused]
    clone = api.tune(load_paused([str(folder), f"clone={numbers[0]}", "optimizer.lr=5e-3"]))
    last = clone.study.trials[-1]
    assert last.state == "finished" and last.point == {"optimizer.lr": 5e-3} and len(clone.study.paused) == 3
    again = api.tune(load_paused([str(folder), f"clone={numbers[0]}", "optimizer.lr=5e-3"]))
    assert len(again.study.trials) == 4  # the same words are the same clone
    own = records(last.folder)
    assert [step for step, *_ in own] == [3, 3, 4, 4]  # its first steps are the other one's

    result = api.tune(load_paused([str(folder), "keep=2"]))
    assert not result.paused
    states = {trial.number: trial.state for trial in result.study.trials}
    assert states == {numbers[0]: "finished", numbers[1]: "finished", numbers[2]: "stopped", last.number: "finished"}

    whole = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *GRID)))
    for number in numbers[:2]:
        assert records(result.study.trials[number].folder) == records(whole.study.trials[number].folder)
        assert result.study.trials[number].value == whole.study.trials[number].value
    assert json.loads((folder / "results.json").read_text())["best"]["folder"] == str(result.folder)
    best = load_config("train", [f"output_dir={tmp_path / 'again'}"], config_dir=folder, config_name="best")
    assert api.train(best).summary.steps == whole.study.trials[numbers[0]].total_steps  # resume=must is not the best run's


@pytest.mark.parametrize(
    ("words_after", "rule"),
    [
        ([], "needs the folder of a sweep"),
        (["{there}/damaged", "keep=1"], "needs the folder of a sweep"),
        (["{there}"], "must say which trials resume"),
        (["{there}", "keep=half"], "must be a whole number"),
        (["{there}", "clone=1"], "goes with the settings that it changes"),
        (["{there}", "keep=1", "optimizer.lr=1"], "goes with the settings that it changes"),
        (["{there}", "clone=1", "resources=local"], "can't be varied"),
        (["{there}", "keep=1", "keep=2"], "has a setting twice"),
        (["{there}", "clone=1", "optimizer.lr=1,2"], "must have one value here"),
        (["{there}", "clone=1", "adapter.rank=4"], "can't be varied by a clone"),
        (["{there}", "clone=1", "optimizer.lr=-1"], "optimizer.lr must be above 0"),
    ],
)
def test_what_goes_on_is_said_in_words_that_make_sense(words_after, rule, tmp_path):
    sweep = {
        "words": ["data.path=x", "data.eval_fraction=0.1", "optimizer.lr=1,2", "tune=grid"],
        "config_dir": None,
        "config_name": None,
    }
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "sweep.json").write_text('{"words": []}')
    with pytest.raises(ConfigError, match=rule):
        load_paused([word.format(there=os.fspath(tmp_path)) for word in words_after])


def test_a_clone_ends_with_the_best_model_of_the_trial_that_it_began_from(chat_rows, cache, tmp_path):
    best = ("optimizer.lr=1e2,2e2", "tune=grid", "train.max_steps=4", "checkpoint.final=best", "tune.pause_at=0.5")
    before = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *best)))
    trial, _ = before.study.paused
    assert trial.reports[1] < trial.reports[2]  # the first step, of rate 0, is the best

    api.tune(load_paused([str(tmp_path), f"clone={trial.number}", "optimizer.lr=3e2"]))
    result = api.tune(load_paused([str(tmp_path), "keep=1"]))
    clone = result.study.trials[-1]
    assert (clone.state, clone.reason, clone.value) == ("finished", None, trial.reports[1])
    assert result.study.trials[trial.number].value == trial.reports[1]


def test_what_is_taken_over_leaves_nothing_of_what_was_there(chat_rows, cache, tmp_path):
    best = ("optimizer.lr=1e2,2e2", "tune=grid", "train.max_steps=4", "checkpoint.final=best", "tune.pause_at=0.75")
    study = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *best, "checkpoint.keep=1"))).study
    donor, other = (trial.folder for trial in study.paused)
    extra = other / "checkpoints" / "step-2"  # of weights that are given up
    shutil.copytree(other / "checkpoints" / "step-3", extra)
    adopt(study.run_of(study.paused[1]), donor)
    there = {path.relative_to(donor): path.read_bytes() for path in donor.glob("checkpoints/step-*/state/*")}
    assert {path.relative_to(other): path.read_bytes() for path in other.glob("checkpoints/step-*/state/*")} == there
    assert {path.parts[1] for path in there} == {"step-1", "step-3"} and not extra.exists()
    assert history(other) == read_metrics(donor / "metrics.jsonl")


def paused_by_hand(folder, *space):
    given = ["+experiment=sft_smollm2", "resources=inline", "tune.pause_at=0.25", f"output_dir={folder}", *space]
    sweep = load_sweep(given)
    study = Study(sweep, metric_of(sweep.tune))
    (folder / "sweep.json").write_text(command_of(sweep))
    while (trial := study.next()) is not None:
        loss = loss_of(study.run_of(trial), 1)
        study.report(trial, 1, 4, loss)
        study.end(trial, "paused", loss)
    study.close()
    return sweep, study


@pytest.mark.parametrize(
    ("space", "change"),
    [
        (["adapter.rank=4,8", "optimizer.lr=1e-4,1e-3", "tune=grid"], {"optimizer.lr": 1e-4}),
        (["optimizer.lr=1e-3,1e-5", "tune=random", "tune.trials=3"], {"optimizer.lr": 1e-5}),  # the base is the second best
        (["adapter.rank=4,8", "tune=grid"], None),
    ],
)
def test_the_command_for_a_clone_can_be_pasted(space, change, tmp_path):
    sweep, study = paused_by_hand(tmp_path, *space)
    console = Console(width=400, file=StringIO())
    _print_paused(console, sweep, study)
    lines = [line.removeprefix("Next: ").strip() for line in console.file.getvalue().splitlines() if "clone=" in line]
    assert len(lines) == (change is not None)
    for line in lines:
        _, _, _, verb, resume, *rest = shlex.split(line)
        again = load_paused(rest)
        assert (verb, resume, again.chosen.changes) == ("tune", "resume", change)
        check_choice(Study(again, study.metric), again.chosen)


def test_a_clone_whose_values_do_not_go_together_is_refused_before_it_is_one(tmp_path):
    pairs = ["stage=dpo", "data=chat_pairs", "data.path=x", "data.eval_fraction=0.1"]
    sweep = load_sweep([*pairs, "stage.loss=sigmoid,hinge", "tune=grid", f"output_dir={tmp_path}"])
    study = Study(sweep, metric_of(sweep.tune))
    for trial in (study.next(), study.next()):
        study.report(trial, 1, 4, 1.0)
        study.end(trial, "paused", 1.0)
    with pytest.raises(ConfigError, match=r"label_smoothing is not read with stage\.loss=hinge"):
        check_choice(study, Chosen(keep=None, clone=1, changes={"stage.label_smoothing": 0.1}))
    check_choice(study, Chosen(keep=None, clone=0, changes={"stage.label_smoothing": 0.1}))
    study.close()

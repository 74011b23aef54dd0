"""Sweeps that wait: trials that resume come to the numbers of trials that never waited."""

from __future__ import annotations

import json
import os

import pytest

from raytune_llm import ConfigError, api, load_config, load_sweep
from raytune_llm.config.sweep import load_paused
from raytune_llm.report.metrics import read_metrics
from tests.unit.tune.test_run import words

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

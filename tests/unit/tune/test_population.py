"""Population-based training: who takes over whom, and that a sweep that was interrupted comes to the same numbers."""

from __future__ import annotations

import json
import random

import pytest

from raytune_llm import ConfigError, api, load_sweep
from raytune_llm.report.metrics import read_metrics
from raytune_llm.tune.population import exploited, near
from raytune_llm.tune.run import run_sweep
from raytune_llm.tune.study import Study
from raytune_llm.tune.trial import Trial
from tests.unit.tune.test_run import words
from tests.unit.tune.test_study import loss_of, study_in

PBT = (
    "tune=grid",
    "optimizer.lr=1e-9,1e-3,1e-2",
    "tune.scheduler=pbt",
    "tune.grace=0.5",
    "train.max_steps=4",
    "checkpoint.every_steps=1",
)


def test_the_worst_take_over_the_best_with_values_near_theirs(tmp_path):
    pbt = (
        "optimizer.weight_decay=interval(0,0.1)",
        "adapter.rank=4",
        "tune.scheduler=pbt",
        "tune.trials=6",
        "tune.base_first=false",
    )
    taken = []
    study = study_in(tmp_path, *pbt, "train.eval_every_steps=10", adopt=lambda run, donor: taken.append((run.output_dir, donor)))
    for _ in range(6):
        trial = study.next()
        assert trial is not None and study.run_of(trial).train.pause_at == 0.1
        study.report(trial, 1, 10, loss_of(study.run_of(trial), 1))
        study.end(trial, "paused", loss_of(study.run_of(trial), 1))
    waiting = study.paused
    planned = list(exploited(study.sweep, waiting, 0))
    assert [trial for trial, _, _ in planned] == waiting[4:] and all(donor in waiting[:2] for _, donor, _ in planned)
    for _, donor, point in planned:
        assert point["optimizer.lr"] / donor.point["optimizer.lr"] == pytest.approx(0.8, rel=0.01) or point[
            "optimizer.lr"
        ] / donor.point["optimizer.lr"] == pytest.approx(1.2, rel=0.01)
    again = study.next()
    assert again is not None and study.run_of(again).train.pause_at == 0.2
    assert taken == [(str(trial.folder), donor.folder) for trial, donor, _ in planned]
    assert [trial.point for trial, _, _ in planned] == [point for _, _, point in planned]
    points = [trial.point for trial in study.trials]
    study.close()
    resumed = Study(study.sweep, study.metric)
    assert [trial.point for trial in resumed.trials] == points and len(resumed.interrupted) == 6
    resumed.close()


def test_what_a_checkpoint_fixes_is_not_varied(tmp_path):
    pbt = ["data.path=x", "data.eval_fraction=0.1", "train.eval_every_steps=1", "tune.scheduler=pbt"]
    for given in (["adapter.rank=4,8"], ["optimizer.lr=interval(1e-4,1e-2)", "tune.first=[{adapter.rank: 4}]"]):
        with pytest.raises(ConfigError, match=r"adapter\.rank can't be varied with tune\.scheduler=pbt"):
            load_sweep([*pbt, *given])


def test_all_settings_of_the_best_are_taken_over_those_outside_the_space_too(tmp_path):
    pbt = ("data.path=x", "data.eval_fraction=0.1", "train.eval_every_steps=1", "tune.scheduler=pbt", "tune.trials=2")
    sweep = load_sweep([*pbt, "optimizer.lr=interval(1e-4,1e-2)", "tune.first=[{optimizer.weight_decay: 0.5}]"])
    taken = near(sweep, {"optimizer.weight_decay": 0.5}, random.Random(0))
    assert taken["optimizer.weight_decay"] == 0.5 and "optimizer.lr" in taken


def numbers(folder):
    trials = json.loads((folder / "results.json").read_text())["trials"]
    plain = [{name: trial[name] for name in ("settings", "state", "metric", "step")} for trial in trials]
    logs = [read_metrics(folder / "trials" / path.name / "metrics.jsonl") for path in sorted((folder / "trials").iterdir())]
    return plain, [[(record["step"], record.get("loss"), record.get("eval_loss")) for record in log] for log in logs]


def test_an_interrupted_population_is_an_undisturbed_one(chat_rows, cache, tmp_path):
    whole, cut = (load_sweep(words(chat_rows, cache, tmp_path / name, *PBT)) for name in ("whole", "cut"))
    result = api.tune(whole)
    assert [(trial.state, trial.step) for trial in result.study.trials] == [("finished", 4)] * 3
    worst = result.study.trials[0]
    assert worst.point != {"optimizer.lr": 1e-9}
    assert worst.reports[3] < worst.reports[2] - 1e-3  # what it took over has learnt, and its own rate would not have moved it

    def interrupt(study, trial):
        if (trial.number, trial.step) == (1, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.tune(cut, on_change=interrupt)
    api.tune(load_sweep(words(chat_rows, cache, tmp_path / "cut", *PBT)))
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("value", [None, 4, 40])
def test_what_the_base_has_no_number_for_is_drawn(value, tmp_path):
    wide = ("data.path=x", "data.eval_fraction=0.1", "train.eval_every_steps=1", "tune.scheduler=pbt", "tune.trials=2")
    sweep = load_sweep([*wide, "stage.neftune_alpha=interval(1,10)"])
    point = {} if value is None else {"stage.neftune_alpha": value}
    found = {near(sweep, point, random.Random(seed))["stage.neftune_alpha"] for seed in range(20)}
    assert all(1 <= one <= 10 for one in found)
    assert len(found) == {None: 20, 4: 2, 40: 1}[value]


def test_values_near_the_best_that_do_not_go_together_leave_the_best_as_they_are(tmp_path):
    given = ("data.path=x", "data.eval_fraction=0.1", "train.eval_every_steps=1", "tune.scheduler=pbt", "tune.trials=1")
    losses = ("stage=dpo", "data=chat_pairs", "stage.loss=sigmoid,hinge", "stage.label_smoothing=0.0,0.1")
    sweep = load_sweep([*given, *losses])
    waiting = [
        Trial(number=number, point={"stage.loss": loss, "stage.label_smoothing": 0.0}, seed=1, folder=tmp_path)
        for number, loss in enumerate(["hinge", "sigmoid"])
    ]
    points = [point for number in range(20) for _, _, point in exploited(sweep, waiting, number)]
    assert all(sweep.composes(point) for point in points)
    assert waiting[0].point in points and len({str(point) for point in points}) > 1


@pytest.mark.parametrize(("schedule", "told"), [("cosine", True), ("wsd", True), ("constant", False), ("inverse_sqrt", False)])
def test_a_schedule_that_depends_on_the_total_is_said(schedule, told, chat_rows, cache, tmp_path):
    def train(run, **hooks):
        raise KeyboardInterrupt

    lines = []
    with pytest.raises(KeyboardInterrupt):
        run_sweep(load_sweep(words(chat_rows, cache, tmp_path, *PBT, f"schedule={schedule}")), train, notify=lines.append)
    assert [f"schedule={schedule} changes the learning rate up to the last step" in line for line in lines] == [True] * told

"""A sweep's state follows from its log: whatever is cut off, the same trials come next."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from functools import cache
from io import StringIO

import pytest
from rich.console import Console

from raytune_llm import ConfigError, DataError, load_sweep
from raytune_llm.commands.tune import trials_table
from raytune_llm.tune.events import EVENTS
from raytune_llm.tune.halving import Halving
from raytune_llm.tune.metric import metric_of
from raytune_llm.tune.results import results, write_results
from raytune_llm.tune.searchers import Optuna
from raytune_llm.tune.study import Study, folder_name


@cache
def sweep(*words):
    lr = "optimizer.lr=tag(log,interval(1e-5,1e-1))"
    ranks = [] if any(word.startswith("adapter.rank=") for word in words) else ["adapter.rank=4,8"]
    lrs = [] if "tune=grid" in words else [lr]
    return load_sweep(["+experiment=sft_smollm2", "resources=inline", *lrs, *ranks, *words])


def study_in(folder, *words, adopt=None):
    made = sweep(*words)
    there = replace(made, run=replace(made.run, output_dir=str(folder)))
    vars(there)["_composed"] = made._composed  # composed once
    return Study(there, metric_of(made.tune), adopt)


def loss_of(run, step):
    return 1 + abs(math.log(run.optimizer.lr / 1e-3)) / (1 + step) + 1 / run.adapter.rank


def advance(study, trial, *, until=4, then="ends"):
    """Reports of four steps, as a run would make them."""
    run = study.run_of(trial)
    for step in range(1, until + 1):
        if not study.report(trial, step, 4, loss_of(run, step)) and step < 4:
            study.end(trial, "stopped", loss_of(run, step))
            return
        if run.train.pause_at is not None and step >= 4 * run.train.pause_at:
            study.end(trial, "paused", loss_of(run, step))
            return
    if then == "ends":
        study.end(trial, "finished", loss_of(run, 4))


def to_the_end(study):
    while (trial := study.next()) is not None:
        advance(study, trial)
    return results(study)


def without_places(found):
    trials = [{name: value for name, value in one.items() if name not in ("folder", "seconds")} for one in found["trials"]]
    return found["best"]["settings"], found["best"]["metric"], trials


@pytest.mark.parametrize("how", ["tune=asha", "tune=random", "tune=optuna"])
@pytest.mark.parametrize("cut", [("whole", 3), ("in a trial", 5), ("in a line", 4)])
def test_a_resumed_sweep_is_an_uninterrupted_one(how, cut, tmp_path):
    if "optuna" in how:
        pytest.importorskip("optuna")
    words = (how, "tune.trials=9", "tune.grace=0.25")
    whole = to_the_end(study_in(tmp_path / "whole", *words))

    kind, trials = cut
    study = study_in(tmp_path / "cut", *words)
    for _ in range(trials):
        advance(study, study.next())
    advance(study, study.next(), until=1, then="is cut")
    study.close()
    log = tmp_path / "cut" / EVENTS
    if kind == "in a line":
        log.write_bytes(log.read_bytes()[:-9])
    again = study_in(tmp_path / "cut", *words)
    assert len(again.trials) == trials + 1
    assert without_places(to_the_end(again)) == without_places(whole)


def test_finished_trials_do_not_come_again(tmp_path):
    study = study_in(tmp_path, "tune.trials=3")
    advance(study, study.next())
    study.close()
    assert study_in(tmp_path, "tune.trials=3").next().number == 1


def test_a_trial_that_was_to_be_stopped_when_the_power_went_is_stopped(tmp_path):
    words = ("tune=random", "tune.scheduler=hyperband", "tune.trials=3", "tune.grace=0.25", "tune.reduction=5")
    study = study_in(tmp_path, *words)
    first, second = study.next(), study.next()
    study.report(first, 1, 4, 1.0)
    assert not study.report(second, 1, 4, 2.0)
    study.close()
    again = study_in(tmp_path, *words)
    assert [again.next().number, again.next().number] == [0, 2]
    assert again.trials[1].state == "stopped"


def test_more_trials_may_be_asked_for_later_but_no_other_space(tmp_path):
    to_the_end(study_in(tmp_path, "tune.trials=2"))
    assert study_in(tmp_path, "tune.trials=3").next().number == 2
    with pytest.raises(ConfigError, match=r"holds another sweep: what changed is space.adapter.alpha"):
        study_in(tmp_path, "tune.trials=3", "adapter.alpha=1.0,2.0")


def test_resume_never_starts_anew(tmp_path):
    to_the_end(study_in(tmp_path, "tune.trials=2"))
    assert study_in(tmp_path, "tune.trials=2", "resume=never").trials == []


@pytest.mark.parametrize(
    ("row", "line", "how"),
    [
        (1, '{"event": "began", "trial": 0, "point": {}}', "must say what sweep it is of"),
        (2, "[1, 2]", "is no event"),
        (2, "{", "is no JSON object"),
        (3, '{"event": "reported", "trial": 7, "step": 1, "of": 4, "value": 1.0}', "doesn't go with those before it"),
        (3, '{"event": "reported", "trial": 0}', "doesn't go with those before it"),
        (3, '{"event": "forgotten"}', "doesn't go with those before it"),
    ],
)
def test_a_log_that_others_changed_is_named_with_its_row(row, line, how, tmp_path):
    to_the_end(study_in(tmp_path, "tune.trials=2"))
    log = tmp_path / EVENTS
    lines = log.read_text().splitlines()
    lines[row - 1] = line
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=f"{EVENTS}, row {row}: {how}"):
        study_in(tmp_path, "tune.trials=2")
    assert study_in(tmp_path, "tune.trials=2", "resume=never").trials == []


def test_seeds_are_averaged_and_a_setting_that_lost_one_has_no_value(tmp_path):
    study = study_in(tmp_path, "tune.trials=2", "tune.seeds=2")
    for value in (1.0, 2.0):
        study.end(study.next(), "finished", value)
    study.end(study.next(), "finished", 0.5)
    study.end(study.next(), "failed", None, "it broke")
    assert [trial.seed for trial in study.trials] == [42, 43, 42, 43]
    assert [setting.value for setting in study.settings] == [1.5, None]
    assert results(study)["best"]["metric"] == 1.5


def test_optuna_learns_from_what_it_is_told(tmp_path):
    pytest.importorskip("optuna")

    def points(folder, sign):
        study = study_in(folder, "tune=optuna", "tune.trials=10")
        while (trial := study.next()) is not None:
            study.end(trial, "finished", sign * study.run_of(trial).optimizer.lr)
        return [dict(trial.point) for trial in study.trials]

    less, again, more = points(tmp_path / "a", 1), points(tmp_path / "b", 1), points(tmp_path / "c", -1)
    assert less == again
    assert less[:5] == more[:5] and less[5:] != more[5:]
    assert sum(math.log(point["optimizer.lr"]) for point in less[6:]) < sum(math.log(point["optimizer.lr"]) for point in more[6:])


SEVERAL = ("tune=optuna", "tune.metric=[eval_loss,operator:itemgetter]", "tune.mode=[min,max]", "tune.trials=10")


def two_figures(study, trial):
    """Each better where the other is worse; trials of rank 4 are worse by both."""
    run = study.run_of(trial)
    place, penalty = math.log10(run.optimizer.lr), 5.0 * (run.adapter.rank == 4)
    study.end(trial, "finished", place + penalty, others=(place - penalty,))


@pytest.mark.parametrize("cut", [None, 6])
def test_optuna_looks_for_the_front_of_several_metrics(cut, tmp_path):
    pytest.importorskip("optuna")
    study = study_in(tmp_path, *SEVERAL)
    for _ in range(cut or 0):
        two_figures(study, study.next())
    if cut:
        study.close()
        study = study_in(tmp_path, *SEVERAL)
    while (trial := study.next()) is not None:
        two_figures(study, trial)
    found = results(study)
    assert found["metrics"] == [{"name": "eval_loss", "mode": "min"}, {"name": "operator:itemgetter", "mode": "max"}]
    front = [one["settings"] for one in found["pareto"]]
    assert front and all(settings.get("adapter.rank", 8) == 8 for settings in front)
    assert len(front) == sum(trial.point.get("adapter.rank", 8) == 8 for trial in study.trials)
    assert found["best"]["settings"] == front[0]
    assert found["pareto"][0]["metrics"]["eval_loss"] == min(one["metrics"]["eval_loss"] for one in found["pareto"])
    assert [sum(trial.point.get("adapter.rank") == 4 for trial in study.trials)] < [5]
    assert [dict(trial.point) for trial in study.trials] == whole_search(tmp_path / "whole")


def whole_search(folder):
    study = study_in(folder, *SEVERAL)
    while (trial := study.next()) is not None:
        two_figures(study, trial)
    return [dict(trial.point) for trial in study.trials]


def test_values_stand_in_tables_as_they_are_typed(tmp_path):
    study = study_in(tmp_path, "adapter.targets=[q_proj],[q_proj,v_proj]", "data.packing=false", "tune=grid")
    to_the_end(study)
    write_results(study)
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert {row["adapter.targets"] for row in rows} == {"[q_proj]", "[q_proj,v_proj]"}
    shown = Console(width=200, file=StringIO())
    shown.print(trials_table(study))
    assert "[q_proj,v_proj]" in shown.file.getvalue() and "'" not in shown.file.getvalue()


def test_folders_are_named_by_their_values_or_by_a_hash():
    assert folder_name({"optimizer.lr": 0.001, "adapter.rank": 8}) == "lr=0.001,rank=8"
    assert folder_name({}) == "base"
    assert len(folder_name({"data.path": "/a/very/long path"})) == 12


HALVED = ("tune=asha", "tune.trials=9", "tune.grace=0.25", "tune.reduction=2")
"""Rungs at the first and the second of four steps."""


def test_the_best_part_of_all_trials_resumes_from_each_rung_and_the_others_end_there(tmp_path):
    study = study_in(tmp_path, *HALVED)
    to_the_end(study)
    left = study.trials
    for step, count in ((1, 4), (2, 2)):
        left = sorted(left, key=lambda trial, step=step: loss_of(study.run_of(trial), step))
        assert {(trial.state, trial.step) for trial in left[count:]} == {("stopped", step)}
        left = left[:count]
    assert {(trial.state, trial.step) for trial in left} == {("finished", 4)}
    assert Halving((0.25, 0.5), reduction=2, trials=9).work == sum(trial.step / 4 for trial in study.trials) == 4.25
    study.close()


def test_the_time_that_is_left_is_that_of_the_steps_that_are_left(tmp_path):
    study = study_in(tmp_path, *HALVED)
    assert study.seconds_left is None
    for _ in range(9):
        trial = study.next()
        trial.seconds = 10.0  # for one step
        advance(study, trial)
    assert study.seconds_left == pytest.approx(10.0 * (4 * 1 + 2 * 2))
    study.close()


@pytest.mark.parametrize("places", [2, 3, 9])
def test_what_resumes_does_not_depend_on_which_trial_is_faster(places, tmp_path):
    alone = without_places(to_the_end(study_in(tmp_path / "alone", *HALVED)))
    study, running = study_in(tmp_path / "together", *HALVED), []
    while True:
        while len(running) < places and (trial := study.next()) is not None:
            running.append(trial)
        if not running:
            break
        advance(study, running.pop())  # the latest is the fastest
    assert without_places(results(study)) == alone
    study.close()


def test_a_log_that_is_cut_anywhere_comes_to_the_same_results(tmp_path):
    whole = to_the_end(study_in(tmp_path, *HALVED))
    lines = (tmp_path / EVENTS).read_text().splitlines(keepends=True)
    assert any('"promoted"' in line for line in lines)
    for end in range(1, len(lines)):
        folder = tmp_path / str(end)
        folder.mkdir()
        (folder / EVENTS).write_text("".join(lines[:end]))
        again = study_in(folder, *HALVED)
        assert without_places(to_the_end(again)) == without_places(whole), lines[end - 1]
        again.close()


def test_where_a_trial_fails_after_it_resumed_the_next_best_takes_its_place(tmp_path):
    study, failed = study_in(tmp_path, *HALVED), []
    while (trial := study.next()) is not None:
        if trial.round == 2 and not failed:
            failed.append(trial)
            study.end(trial, "failed", None, "it broke")
        else:
            advance(study, trial)
    states = [trial.state for trial in study.trials]
    assert (states.count("failed"), states.count("finished"), states.count("stopped")) == (1, 2, 6)
    study.close()


def test_more_trials_after_the_end_compete_with_those_before(tmp_path):
    few = study_in(tmp_path, "tune=asha", "tune.trials=3", "tune.grace=0.25")
    to_the_end(few)
    few.close()
    more = study_in(tmp_path, "tune=asha", "tune.trials=9", "tune.grace=0.25")
    to_the_end(more)
    assert len(more.trials) == 9 and more.ranked
    assert {trial.state for trial in more.trials} == {"finished", "stopped"}
    more.close()


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (("tune=asha",), [0.1, 0.3]),
        (("tune=asha", "checkpoint.final=best"), None),
        (("tune=asha", "train.early_stopping=2"), None),
        (("tune=asha", "train.eval_at=[0.2]"), [0.2]),
        (("tune=random", "tune.scheduler=median"), None),
    ],
)
def test_trials_are_evaluated_at_rungs_alone_unless_more_depends_on_evaluations(words, there, tmp_path):
    study = study_in(tmp_path, *words)
    run = study.run_of(study.next())
    assert run.train.eval_at == there and run.train.eval_every_steps == 111
    study.close()


def paused_study(folder, adopt=None):
    study = study_in(folder, "tune=grid", "adapter.rank=4,8,16", "tune.pause_at=0.25", adopt=adopt)
    while (trial := study.next()) is not None:
        run = study.run_of(trial)
        assert run.train.pause_at == 0.25
        assert study.report(trial, 1, 4, loss_of(run, 1))
        study.end(trial, "paused", loss_of(run, 1))
    return study


def test_trials_that_wait_go_on_where_they_are_chosen_and_the_others_end(tmp_path):
    study = paused_study(tmp_path)
    waiting = study.paused
    assert len(waiting) == len(study.trials) and not study.ranked
    assert [trial.latest for trial in waiting] == sorted(trial.latest for trial in waiting)
    study.release(waiting[:2])
    assert [study.next(), study.next(), study.next()] == [*waiting[:2], None]
    assert study.run_of(waiting[0]).train.pause_at is None
    study.close()
    again = study_in(tmp_path, "tune=grid", "adapter.rank=4,8,16", "tune.pause_at=0.25")  # the power went
    assert [trial.number for trial in again.interrupted] == sorted(trial.number for trial in waiting[:2])
    assert {trial.state for trial in again.trials} == {"running", "stopped"}
    again.close()


def test_a_clone_begins_with_what_its_model_has_learnt_and_goes_to_its_end(tmp_path):
    adopted = []
    study = paused_study(tmp_path, adopt=lambda run, folder: adopted.append((run.output_dir, folder)))
    first = study.paused[0]
    study.clone(first, {"optimizer.lr": 0.5})
    clone = study.next()
    assert clone is not None
    assert clone.point == {**first.point, "optimizer.lr": 0.5} and study.next() is None
    assert adopted == [(str(clone.folder), first.folder)]
    assert study.run_of(clone).train.pause_at is None and study.run_of(clone).optimizer.lr == 0.5
    study.close()
    again = study_in(tmp_path, "tune=grid", "adapter.rank=4,8,16", "tune.pause_at=0.25")
    assert [trial.point for trial in again.interrupted] == [clone.point]
    assert len(again.paused) == len(again.trials) - 1
    again.close()


def test_optuna_is_asked_again_for_the_points_of_the_log_where_a_trial_is_tried_again(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    words = ("tune=optuna", "tune.trials=12")
    study = study_in(tmp_path, *words)
    for number in range(12):
        trial = study.next()
        if number == 8:
            study.end(trial, "failed", None, "the disk is full", again=True)
        else:
            advance(study, trial)
    study.close()
    drawn, ask = [], Optuna.ask
    monkeypatch.setattr(Optuna, "ask", lambda self: drawn.append(ask(self)) or drawn[-1])
    again = study_in(tmp_path, *words)
    assert drawn == [trial.point for trial in study.trials]
    assert [trial.number for trial in again.interrupted] == [8]
    to_the_end(again)
    assert {trial.state for trial in again.trials} == {"finished"}
    again.close()


def test_fewer_trials_may_be_asked_for_later(tmp_path):
    pytest.importorskip("optuna")
    to_the_end(study_in(tmp_path, "tune=optuna", "tune.trials=4"))
    fewer = study_in(tmp_path, "tune=optuna", "tune.trials=2")
    assert len(fewer.trials) == 4 and fewer.next() is None
    assert study_in(tmp_path, "tune=optuna", "tune.trials=5").next().number == 4


def test_settings_outside_the_space_have_one_column_each(tmp_path):
    more = ("tune.first=[{adapter.alpha: 3.0}, {adapter.alpha: 5.0}]", "tune.pause_at=0.25", "tune.trials=3")
    study = study_in(tmp_path, *more, adopt=lambda run, folder: None)
    to_the_end(study)
    study.clone(study.paused[0], {"optimizer.weight_decay": 0.5})
    write_results(study)
    study.close()
    header, *_ = csv.reader((tmp_path / "trials.csv").open())
    assert header[:6] == ["trial", "optimizer.lr", "adapter.rank", "adapter.alpha", "optimizer.weight_decay", "seed"]
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    base = study.sweep.base
    assert [float(row["adapter.alpha"]) for row in rows[:3]] == [base.adapter.alpha, 3.0, 5.0]
    assert [float(row["optimizer.weight_decay"]) for row in rows] == [*[base.optimizer.weight_decay] * 3, 0.5]
    shown = Console(width=200, file=StringIO())
    shown.print(trials_table(study))
    assert "adapter.alpha" in shown.file.getvalue() and "optimizer.weight_decay" in shown.file.getvalue()

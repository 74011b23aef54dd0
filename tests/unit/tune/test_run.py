"""Sweeps of a tiny model, as the command runs them."""

from __future__ import annotations

import csv
import gc
import json
import math
import shutil
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from raytune_llm import ConfigError, Diverged, ResourceError, UserError, api, load_config, load_sweep
from raytune_llm.commands.tune import print_best
from raytune_llm.report.metrics import read_metrics
from raytune_llm.runs import preflight
from raytune_llm.tune.metric import Metric
from raytune_llm.tune.trial import outcome_of

GRID = ("optimizer.lr=1e-9,1e-2,1e-8", "tune=grid", "tune.scheduler=asha", "tune.grace=0.5", "tune.base_first=true")


def words(rows, cache, folder, *more):
    return [
        "model=tiny_random", "resources=inline", "tracking=none", "train.precision=fp32", "train.log_every_steps=1",
        "train.global_batch_size=4", "train.max_steps=3", "train.eval_every_steps=1", "data.max_length=64",
        "data.eval_fraction=0.1",
        f"data.path={rows}", f"data.cache={cache}", f"output_dir={folder}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def swept(chat_rows, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, api.tune(load_sweep(words(chat_rows, cache, folder, *GRID)))


def test_the_best_trial_is_found_and_kept_and_the_others_leave_no_model(swept):
    folder, result = swept
    assert result.best.point == {"optimizer.lr": 1e-2}
    assert (result.folder / "final" / "adapter_model.safetensors").exists()
    assert [path.parent.name for path in (folder / "trials").glob("*/final")] == [result.folder.name]


def test_worse_trials_are_stopped_early(swept):
    _, result = swept
    states = {trial.number: (trial.state, trial.step) for trial in result.study.trials}
    assert states == {0: ("stopped", 2), 1: ("stopped", 2), 2: ("finished", 3), 3: ("stopped", 2)}
    assert not [path for trial in result.study.trials if trial.state == "stopped" for path in trial.folder.glob("checkpoints")]


def test_a_trial_is_evaluated_where_it_is_compared_and_at_its_end(swept):
    _, result = swept
    for trial in result.study.trials:
        evaluated = [record["step"] for record in read_metrics(trial.folder / "metrics.jsonl") if "eval_loss" in record]
        assert evaluated == ([2, 3] if trial.state == "finished" else [2])


def test_the_folder_says_what_was_tried(swept):
    folder, result = swept
    said = json.loads((folder / "results.json").read_text())
    assert said["best"] == {"settings": {"optimizer.lr": 1e-2}, "metric": result.best.value, "folder": str(result.folder)}
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [float(row["optimizer.lr"]) for row in rows] == [2e-4, 1e-9, 1e-2, 1e-8]
    assert (folder / "sweep.png").stat().st_size > 10_000


def test_where_the_best_model_is_can_be_pasted_from_a_narrow_terminal(swept, chat_rows, cache):
    folder, result = swept
    console = Console(width=40, file=StringIO())
    print_best(console, load_sweep(words(chat_rows, cache, folder, *GRID)), result)
    lines = console.file.getvalue().splitlines()
    assert f"model      {result.folder / 'final'}" in lines
    assert f"plots      {folder / 'sweep.png'}" in lines


def test_the_best_setting_trains_again_as_it_stands(swept, tmp_path):
    folder, result = swept
    run = load_config("train", [f"output_dir={tmp_path}"], config_dir=folder, config_name="best")
    api.train(run)
    again = [record["eval_loss"] for record in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in record]
    assert again[-1] == result.best.value


def test_the_best_setting_trains_again_from_any_folder(chat_rows, cache, tmp_path, monkeypatch):
    shutil.copy(chat_rows, tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    api.tune(load_sweep(words("rows.jsonl", cache, "sweep", "optimizer.lr=1e-3,1e-2", "tune=grid", "train.max_steps=1")))
    monkeypatch.chdir("/")
    best = load_config("train", [], config_dir=tmp_path / "sweep", config_name="best")
    assert api.train(best).summary.steps == 1 and best.output_dir == str(tmp_path / "sweep_best")


def test_a_finished_sweep_is_not_run_again(swept, chat_rows, cache):
    folder, first = swept
    sweep = load_sweep(words(chat_rows, cache, folder, *GRID))
    changes = []
    again = api.tune(sweep, on_change=lambda study, trial: changes.append(trial))
    assert (again.best.point, again.best.value, again.folder) == (
        first.best.point,
        first.best.value,
        first.folder,
    ) and not changes


def test_a_metric_that_no_trial_reports_ends_the_sweep_with_those_that_there_are(chat_rows, cache, tmp_path):
    named = ("data.eval_fraction=0", f"data.eval_path={{a: {chat_rows}}}", "tune.metric=eval_b_loss")
    sweep = load_sweep(words(chat_rows, cache, tmp_path, "adapter.rank=2,4", "tune=grid", *named))
    with pytest.raises(ConfigError, match=r"There are: .*eval_loss"):
        api.tune(sweep)


@pytest.mark.parametrize(
    "given",
    [
        ("adapter.targets=[q_proj],[no_such_layer]", "tune=grid"),
        ("adapter.rank=2,4", "tune.first=[{adapter.targets: [no_such_layer]}]"),
    ],
)
def test_what_can_be_known_to_fail_is_refused_before_the_first_trial(given, chat_rows, cache, tmp_path):
    sweep = load_sweep(words(chat_rows, cache, tmp_path, *given))
    with pytest.raises(ConfigError, match="no_such_layer"):
        api.tune(sweep)
    assert not list(tmp_path.iterdir())


def test_what_a_sweep_asks_of_the_model_is_looked_at_before_its_first_trial_alone(chat_rows, cache, tmp_path, monkeypatch):
    looked, check = [], preflight._check
    monkeypatch.setattr(preflight, "_check", lambda run, workspace: (looked.append(run), check(run, workspace)))
    before = []
    combined = ("adapter.rank=2,4", "adapter.alpha=4.0,8.0", "tune=grid", "train.max_steps=1")
    api.tune(load_sweep(words(chat_rows, cache, tmp_path, *combined)), on_change=lambda *_: before.append(len(looked)))
    assert set(before) == {len(looked)} == {5}  # the base, two ranks, two alphas: no combination


def test_several_metrics_have_a_front(chat_rows, cache, tmp_path):
    several = ("optimizer.lr=1e-9,1e-2", "tune=grid", "tune.metric=[eval_loss,operator:attrgetter]", "tune.mode=[min,max]")
    with pytest.raises(ConfigError, match="must return a number"):
        api.tune(load_sweep(words(chat_rows, cache, tmp_path / "a", *several)))
    several = ("optimizer.lr=1e-9,1e-2", "tune=grid", "tune.metric=[eval_loss,eval_token_accuracy]")
    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path / "b", *several)))
    said = json.loads((tmp_path / "b" / "results.json").read_text())
    assert said["metrics"][1] == {"name": "eval_token_accuracy", "mode": "max"}
    assert said["pareto"][0]["settings"] == said["best"]["settings"] == {"optimizer.lr": 1e-2}
    rows = list(csv.DictReader((tmp_path / "b" / "trials.csv").open()))
    assert [float(row["eval_token_accuracy"]) for row in rows] == [trial.others[0] for trial in result.study.trials]


@pytest.mark.parametrize("wrong", ["data.path={}/no_such_rows.jsonl", "adapter.targets=[no_such_layer]"])
def test_a_sweep_that_cannot_be_leaves_the_one_before_it(wrong, swept, chat_rows, cache):
    folder, _ = swept
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    others = [word for word in words(chat_rows, cache, folder, *GRID) if not word.startswith(wrong.partition("=")[0])]
    with pytest.raises(UserError, match="no_such"):
        api.tune(load_sweep([*others, wrong.format(folder), "resume=never"]))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_trial_that_breaks_ends_with_its_reason_and_the_others_go_on(chat_rows, cache, tmp_path):
    def train(run, **hooks):
        if run.adapter.rank == 2:
            raise ResourceError("it broke")
        return api.train(run, **hooks)

    from raytune_llm.tune.run import run_sweep

    result = run_sweep(load_sweep(words(chat_rows, cache, tmp_path, "adapter.rank=2,4", "tune=grid")), train)
    assert [(trial.state, trial.reason) for trial in result.study.trials] == [("failed", "it broke."), ("finished", None)]


@pytest.mark.parametrize(
    ("error", "states"),
    [
        (ResourceError("the disk is full"), ["finished", "finished"]),
        (Diverged("nan", "Lower it."), ["failed", "finished"]),
    ],
)
def test_the_same_command_tries_again_what_failed_for_the_machine_s_sake(error, states, chat_rows, cache, tmp_path):
    from raytune_llm.tune.run import run_sweep

    trained = []

    def train(run, **hooks):
        trained.append(run.adapter.rank)
        if run.adapter.rank == 2 and trained.count(2) == 1:
            raise error
        return api.train(run, **hooks)

    sweep = load_sweep(words(chat_rows, cache, tmp_path, "adapter.rank=2,4", "tune=grid"))
    assert [trial.state for trial in run_sweep(sweep, train).study.trials] == ["failed", "finished"]
    for _ in range(2):
        assert [trial.state for trial in run_sweep(sweep, train).study.trials] == states
    assert len(trained) == 2 + states.count("finished") - 1


def test_a_metric_that_is_no_number_is_no_result(chat_rows, cache, tmp_path):
    figure = ("tune.metric=operator:neg", "tune.mode=max", "train.max_steps=1")
    with pytest.raises(ConfigError, match=r"tune.metric must return a number .*TypeError"):
        api.tune(load_sweep(words(chat_rows, cache, tmp_path, "adapter.rank=2,4", "tune=grid", *figure)))

    run = load_config("train", ["data.path=x", f"output_dir={tmp_path}"])
    infinite = Metric(name="mine", sign=1, at_end=lambda result: math.inf)
    ended = outcome_of(run, infinite, SimpleNamespace(paused=False), None)
    assert (ended.state, ended.reason) == ("failed", "its mine is inf, which is no number to compare")


def test_one_process_runs_one_trial_at_a_time(chat_rows, cache, tmp_path):
    with pytest.raises(ConfigError, match="must be 1 with resources=inline"):
        load_sweep(words(chat_rows, cache, tmp_path, "adapter.rank=2,4", "tune=grid", "tune.max_concurrent=2"))


def test_a_trial_leaves_nothing_in_memory_for_the_next_ones(chat_rows, cache, tmp_path):
    alive = []

    def changed(_, trial):
        if trial.state == "running" and not trial.reports:
            alive.append(sum(isinstance(thing, torch.nn.Module | torch.Tensor) for thing in gc.get_objects()))

    asha = ("optimizer.lr=range(1,13)", "tune=grid", "tune.scheduler=asha", "tune.grace=0.5", "train.max_steps=2")
    api.tune(load_sweep(words(chat_rows, cache, tmp_path, *asha)), on_change=changed)
    assert len(alive) == 12
    assert alive[0] < alive[1] == alive[-1]  # the base remains
    assert gc.get_freeze_count() == 0


def test_the_best_setting_keeps_the_models_of_all_its_seeds(chat_rows, cache, tmp_path):
    seeds = ("optimizer.lr=1e-9,1e-2,1e-8", "tune=grid", "tune.seeds=2", "train.max_steps=2")
    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *seeds)))
    assert result.best.point == {"optimizer.lr": 1e-2}
    kept = {path.parent.name for path in (tmp_path / "trials").glob("*/final")}
    assert kept == {trial.folder.name for trial in result.best.trials} and len(kept) == 2


def test_where_no_trial_has_a_number_the_reason_is_said(chat_rows, cache, tmp_path):
    broken = ("optimizer.lr=1e30,2e30", "tune=grid", "train.max_nonfinite_steps=9", "train.max_grad_norm=null")
    seen = []
    with pytest.raises(ResourceError, match="no trial came to its end: the loss at step 3 is nan"):
        api.tune(load_sweep(words(chat_rows, cache, tmp_path, *broken)), on_change=lambda study, trial: seen.append(trial.latest))
    assert any(value is not None and math.isnan(value) for value in seen)  # there were evaluations
    assert not (tmp_path / "sweep.png").exists() and (tmp_path / "trials.csv").exists()


@pytest.mark.parametrize("shared", ["true", "false"])
def test_values_that_do_not_go_together_end_their_trial_alone(shared, chat_rows, cache, tmp_path):
    pytest.importorskip("optuna")
    drawn = ("optimizer=adamw,sgd", "optimizer.beta1=interval(0.8,0.95)", "tune=optuna", "tune.trials=8", "train.max_steps=1")
    given = words(chat_rows, cache, tmp_path, *drawn, f"tune.share_base={shared}", "tune.max_failures=1")
    result = api.tune(load_sweep(given))
    states = {trial.number: trial.state for trial in result.study.trials}
    assert len(states) == 8 and set(states.values()) == {"finished", "failed"}
    for trial in result.study.trials:
        assert (trial.state == "failed") == (trial.point.get("optimizer") == "sgd")
        assert trial.state == "finished" or "beta1" in (trial.reason or "")
    assert {trial.number: trial.state for trial in api.tune(load_sweep(given)).study.trials} == states


def small_rank(result):
    """A metric that larger adapters don't have."""
    rank = json.loads((result.final / "adapter_config.json").read_text())["r"]
    return {2: 1.0, 3: 2.0}[rank]


@pytest.mark.parametrize(("ranks", "shared"), [("2,4,3", "false"), ("4,2,3", "true")])
def test_a_metric_that_one_trial_has_not_ends_that_trial_alone(ranks, shared, chat_rows, cache, tmp_path):
    metric = (f"tune.metric={__name__}:small_rank", "tune.mode=min", f"tune.share_base={shared}")
    given = words(chat_rows, cache, tmp_path, f"adapter.rank={ranks}", "tune=grid", "train.max_steps=1", *metric)
    for _ in range(2):
        trials = {trial.point["adapter.rank"]: trial for trial in api.tune(load_sweep(given)).study.trials}
        assert {rank: trial.state for rank, trial in trials.items()} == {2: "finished", 3: "finished", 4: "failed"}
        assert "tune.metric must return a number (KeyError(4))" in trials[4].reason


def test_what_is_tried_again_resumes_from_its_checkpoint(chat_rows, cache, tmp_path):
    from raytune_llm.report.updates import RunStarted
    from raytune_llm.tune.run import run_sweep

    full, began = [], []

    def train(run, *, sinks, on_update, **hooks):
        def fill(record):
            if run.adapter.rank == 2 and record["step"] == 2 and not full:
                full.append(record)
                raise ResourceError("the disk is full")

        def update(what):
            if isinstance(what, RunStarted):
                began.append((run.adapter.rank, what.first_step))
            on_update(what)

        return api.train(run, sinks=[*sinks, fill], on_update=update, **hooks)

    given = words(chat_rows, cache, tmp_path, "adapter.rank=2,4", "tune=grid", "checkpoint.every_steps=1")
    assert [trial.state for trial in run_sweep(load_sweep(given), train).study.trials] == ["failed", "finished"]
    assert [trial.state for trial in run_sweep(load_sweep(given), train).study.trials] == ["finished", "finished"]
    assert began == [(2, 0), (4, 0), (2, 1)]
    assert len(list(tmp_path.glob("trials/*/checkpoints"))) == 1  # the better one's

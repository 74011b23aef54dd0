"""A sweep from words: what becomes its space, what its base, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raytune_llm import ConfigError, load_config, load_sweep
from raytune_llm.config import sweep as of_sweeps
from raytune_llm.config.load import compose
from raytune_llm.config.override_syntax import as_override
from raytune_llm.config.overrides import CONF
from raytune_llm.config.space import Choice, Interval
from raytune_llm.config.sweep import COMMAND, command_of, load_paused, load_submitted

BASE = ["+experiment=sft_smollm2", "resources=inline"]


def sweep(*words: str):
    return load_sweep([*BASE, *words])


def test_settings_with_several_values_are_the_space_and_the_others_the_base():
    made = sweep(
        "optimizer.lr=tag(log,interval(1e-5,1e-3))", "adapter.rank=8,16,32", "adapter.alpha=64.0", "optimizer=adamw,muon"
    )
    values = {axis.name: axis.values for axis in made.axes}
    assert values == {
        "optimizer.lr": Interval(1e-5, 1e-3, log=True),
        "adapter.rank": Choice((8, 16, 32)),
        "optimizer": Choice(("adamw", "muon")),
    }
    assert made.base.adapter.alpha == 64.0


def test_a_trial_is_the_run_that_its_values_would_be_if_they_were_typed(tmp_path):
    made = sweep("optimizer.lr=1e-5,1e-3", "optimizer=adamw,muon", "tune=grid")
    point = {"optimizer.lr": 1e-3, "optimizer": "muon"}
    run = made.trial_run(point, seed=42, folder=tmp_path / "001")
    typed = load_config("train", [*BASE, "optimizer.lr=1e-3", "optimizer=muon", f"output_dir={tmp_path}/001", f"name={run.name}"])
    assert run == typed


def test_points_that_differ_in_values_alone_share_one_composition_and_leave_it_as_it_was(monkeypatch):
    composed = []
    monkeypatch.setattr(of_sweeps, "compose", lambda *words, **others: composed.append(words) or compose(*words, **others))
    grid = ("optimizer=adamw,muon", "adapter.rank=range(1,5)", "adapter.targets=[q_proj],[q_proj,v_proj]", "tune=grid")
    made = sweep(*grid, "adapter.rank_pattern={},{q_proj: 4}", "adapter.dropout=0.1")
    assert len(made.planned) == 2 * 4 * 2 * 2
    assert len(composed) == 4  # the base, for itself and for points around it, and with each optimizer
    typed = [*BASE, "adapter.dropout=0.1"]
    for point in made.planned[::7]:
        words = [as_override(setting.lstrip("+"), value) for setting, value in point.items()]
        plain = load_config("train", [*typed, *words, f"output_dir={made.folder}"])
        assert made.composed(point) == plain


def test_a_grid_has_every_combination_and_random_points_depend_on_the_seed_alone():
    words = ("optimizer.lr=1e-4,1e-3", "adapter.rank=range(1,4)")
    assert len(sweep(*words, "tune=grid").planned) == 6
    drawn = [sweep(*words, "tune.trials=4", f"tune.seed={seed}").planned for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] == {}  # the base


def test_more_trials_begin_with_the_same_ones():
    few, many = (sweep("optimizer.lr=interval(0.1,0.9)", f"tune.trials={count}").planned for count in (3, 7))
    assert many[:3] == few


def test_a_point_that_is_the_base_runs_once():
    made = sweep("adapter.rank=8,16", "tune.trials=9")
    assert made.planned == [{}, {"adapter.rank": 8}]  # the experiment's rank is 16


def test_zipped_values_change_together():
    made = sweep("adapter.rank=8,16", "adapter.alpha=16.0,32.0", "tune=grid", "tune.zip=[[adapter.rank,adapter.alpha]]")
    assert [dict(point) for point in made.planned] == [
        {"adapter.rank": 8, "adapter.alpha": 16.0},
        {"adapter.rank": 16, "adapter.alpha": 32.0},
    ]


@pytest.mark.parametrize(
    ("words", "points"),
    [
        (
            ["optimizer=muon,sgd", "optimizer.momentum=0.8,0.9"],
            [("muon", 0.8), ("muon", 0.9), ("sgd", 0.8), ("sgd", 0.9)],
        ),
        (
            ["optimizer=sgd,muon", "optimizer.momentum=0.8,0.9", "tune.zip=[[optimizer,optimizer.momentum]]"],
            [("sgd", 0.8), ("muon", 0.9)],
        ),
    ],
)
def test_values_that_the_base_can_not_have_alone_are_looked_at_with_the_others(words, points):
    made = sweep(*words, "tune=grid")
    assert [(run.optimizer.name, run.optimizer.momentum) for run in map(made.composed, made.planned)] == points


@pytest.mark.parametrize("space", [["data.path=a.jsonl,b.jsonl"], ["tune.space={data.path: [a.jsonl, b.jsonl]}"]])
@pytest.mark.parametrize("tune", ["grid", "random"])
def test_the_space_may_have_what_the_base_lacks_to_be_a_run(space, tune, tmp_path):
    made = load_sweep(["data.eval_fraction=0.1", *space, f"tune={tune}", f"output_dir={tmp_path}"])
    paths = [made.trial_run(point, seed=1, folder=tmp_path / "1").data.path for point in made.planned]
    assert sorted(paths) == ["a.jsonl", "b.jsonl"]


def test_experiments_may_be_chosen_among_as_with_m():
    made = load_sweep(["+experiment=sft_full_tiny,sft_smollm2", "data.eval_fraction=0.1", "tune=grid"])
    for point, name in zip(made.planned, ("sft_full_tiny", "sft_smollm2"), strict=True):
        typed = load_config("train", [f"+experiment={name}", "data.eval_fraction=0.1", "resources=inline"])
        assert replace(made.composed(point), output_dir=typed.output_dir, name=typed.name) == typed


def test_the_base_has_the_names_of_its_options_where_groups_are_chosen_among():
    given = ["resources=local", "data.path=x", "data.eval_fraction=0.1", "tune.trials=2"]
    made = load_sweep([*given, "data=chat,alpaca", "strategy=zero1,zero2"])
    assert [made.value_of(axis, {}) for axis in made.axes] == ["chat", "ddp"]
    assert made.base_value("adapter") == "lora" and made.base_value("data.path") == "x"


def test_a_paused_sweep_resumes_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    words = ["data.path=rows.jsonl", "data.eval_fraction=0.1", "adapter.rank=4,8", "tune.pause_at=0.5", "output_dir=sweep"]
    typed = load_sweep(words)
    Path("sweep").mkdir()
    Path("sweep", COMMAND).write_text(command_of(typed))
    monkeypatch.chdir("/")
    again = load_paused([str(tmp_path / "sweep"), "keep=1"])
    assert again.base.data.path == str(tmp_path / "rows.jsonl") and again.planned == typed.planned
    monkeypatch.chdir(tmp_path)
    assert again.identity == typed.identity


def test_known_good_points_come_after_the_base():
    made = sweep("adapter.rank=8,16", "tune.trials=3", "tune.first=[{optimizer.lr: 3.0e-4}]")
    assert made.planned[:2] == [{}, {"optimizer.lr": 3e-4}]


def test_a_space_in_yaml_may_be_nested_or_dotted_and_the_command_line_has_the_last_word(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - sft_smollm2\n"
        "tune:\n  space:\n    optimizer.lr: tag(log,interval(1e-5,1e-3))\n    adapter:\n      rank: [8, 32]\n"
    )
    made = load_sweep(["+experiment=mine"], config_dir=tmp_path)
    assert {axis.name: axis.values for axis in made.axes} == {
        "optimizer.lr": Interval(1e-5, 1e-3, log=True),
        "adapter.rank": Choice((8, 32)),
    }
    fixed = load_sweep(["+experiment=mine", "adapter.rank=4"], config_dir=tmp_path)
    assert [axis.name for axis in fixed.axes] == ["optimizer.lr"] and fixed.base.adapter.rank == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter.rank=8,0"], "adapter.rank must be at least 1 (with adapter.rank=0)"),
        (["optimizer.lr=interval(-1e-3,1e-3)"], "(with optimizer.lr=-0.001)"),
        (["optimizer.lr=interval(1e-3,1e-5)"], "Write interval(1e-05,0.001)."),
        (["optimizer.lr=tag(log,interval(0,1e-3))"], "must be above 0 to be drawn by its logarithm"),
        (["adapter.rank=8,16", "adapter.rank=4"], "adapter.rank is given twice"),
        (["adapter.rank=8,8"], "has a value twice"),
        (["adapter.rank=8,"], "adapter.rank has values that can't be read, got '8,'"),
        (["optimizer.lr=interval(1e-5)"], "optimizer.lr has values that can't be read, got 'interval(1e-5)'"),
        (["adapter.rank=range(1,9999)"], "at most 1,000 values, got '9,998 of them'. Write int(interval(1,9998))"),
        (["adapter.rank=range(1,1e12)"], "at most 1,000 values"),
        (["adapter.rank=range(1,4,0)"], "adapter.rank must have a step other than 0 in its range"),
        (["optimizer.lr=range(0.1,1.0,0.0)"], "optimizer.lr must have a step other than 0 in its range"),
        (["optimizer.lr=interval(1e-4,1e-2),1e-3"], "has values that can't be read, got 'interval(1e-4,1e-2),1e-3'"),
        (["optimizer.lr=interval(nan,1)"], "must have ends that are finite numbers, got 'interval(nan,1)'"),
        (["adapter.rank=interval(4,16)"], "adapter.rank must be a whole number"),
        (["adapter.rank=interval(4,16)"], "Write int(interval(4,16))."),
        (["tune=grid", "adapter.rank=range(1,99)", "optimizer.lr=range(1,99)"], "up to 1,000 points, got 'a grid of 9,604'"),
        (["adapter.rank=8,16", "tune.first=[{output_dir: x}]"], "output_dir can't be varied"),
        (["adapter.rank=8,16", "tune.first={adapter.rank: 4}"], "tune.first must be a list, got '{adapter.rank: 4}'"),
        (["adapter.rank=8,16", "tune=grid,random"], "tune can't be varied"),
        (["adapter.rank=8,16", "tune.trials=2,3"], "tune.trials can't be varied"),
        (["adapter.rank=2,4", "++tune.space.adapter.rank=[8,16]"], "adapter.rank is given twice"),
        (["tune.space={adapter.rank: 3}"], "tune.space.adapter.rank must have several values, got 3"),
        (["adapter.rank=8,16", "tune.zip=[[adapter.rank]]"], "tune.zip must name two settings or more"),
        (["adapter.rank=8,16", "train.pause_at=0.5"], "train.pause_at is for a run by itself"),
        (["adapter.rnk=8,16"], "Did you mean adapter.rank?"),
        (["optimizer=adamw,moun"], "Did you mean optimizer=muon?"),
        (["tune=grid", "optimizer.lr=interval(1e-5,1e-3)"], "must be a list of values where tune=grid"),
        (["adapter.rank=8,16", "tune.metric=loss"], "must be a metric of an evaluation"),
        (["adapter.rank=8,16", "tune.metric=eval_rewards/accuracies"], "must be a metric that stage=sft reports"),
        (["adapter.rank=8,16", "tune.metric=eval_los", "tune.mode=min"], "Did you mean eval_loss?"),
        (["adapter.rank=8,16", "tune.metric=exact_match", "train.exact_match_rows=0"], "needs train.exact_match_rows"),
        (["adapter.rank=8,16", "tune.metric=a.b:c"], "tune.mode must be min or max"),
        (["adapter.rank=8,16", "tune.metric=[eval_loss,a.b:c]"], "tune.metric=a.b:c doesn't say"),
        (["adapter.rank=8,16", "tune.metric=[eval_loss,eval_loss]"], "has a metric twice"),
        (["adapter.rank=8,16", "tune.metric=[eval_loss]"], "tune.metric must be text or a list of at least 2, got ['eval_loss']"),
        (["adapter.rank=8,16", "tune.mode=[min,max]"], "tune.mode must be one value for one metric, got '[min,max]'"),
        (["adapter.rank=8,16", "tune.metric=[eval_loss,a.b:c]", "tune.mode=[min]"], "one for each of 2 metrics, got '[min]'"),
        (["adapter.rank=8,16", "tune.metric=[eval_loss,eval_accuracy]", "tune.scheduler=asha"], "must be none with several"),
        (["adapter.rank=8,16", "tune.metric=[eval_loss,eval_accuracy]", "tune.pause_at=0.5"], "must be null with several"),
        (["adapter.rank=8,16", "tune.scheduler=median", "train.eval_every_steps=null"], "train.eval_every_steps must be given"),
        (
            ["adapter.rank=8,16", "tune=asha", "train.eval_every_steps=null", "checkpoint.final=best"],
            "train.eval_every_steps must be given",
        ),
        (["adapter.rank=8,16", "tune=asha", "tune.seeds=3"], "tune.seeds must be 1"),
        (["adapter.rank=8,16", "tune=asha", "tune.grace=0.04"], "in which the learning rate warms up, 0.05, got 0.04"),
        (["schedule.warmup_ratio=0.05,0.2", "tune=asha"], "warms up, 0.2 (with schedule.warmup_ratio=0.2), got 0.1"),
        (
            ["adapter.rank=8,16", "tune=asha", "train.max_steps=100", "schedule.warmup_ratio=null", "schedule.warmup_steps=20"],
            "warms up, 0.2, got 0.1",
        ),
        (["output_dir=a,b"], "can't be varied"),
        (["train.seed=1,2"], "Set tune.seeds=3"),
        ([], "the space is empty"),
        (["tune.zip=[[adapter.rank,adapter.alpha]]", "adapter.rank=8,16", "adapter.alpha=8.0,9.0,10.0"], "as many values each"),
        (["tune.zip=[[adapter.rank,adapter.dropout]]", "adapter.rank=8,16"], "must name settings of the space"),
    ],
)
def test_a_wrong_space_is_refused_with_the_setting(words, said):
    with pytest.raises(ConfigError) as error:
        sweep(*words)
    assert said in str(error.value)


@pytest.mark.parametrize("values", ["8,16,32,64,128,256", "range(8,64,8)"])
def test_shuffled_values_are_in_the_same_order_each_time_so_that_the_sweep_can_be_resumed(values):
    first, *others = [sweep(f"adapter.rank=shuffle({values})").identity for _ in range(4)]
    plain = sweep(f"adapter.rank=choice({values})" if "range" not in values else f"adapter.rank={values}").identity
    assert all(other == first for other in others) and first["space"] != plain["space"]


def test_the_sweeps_folder_holds_its_trials():
    made = sweep("adapter.rank=8,16", "output_dir=somewhere")
    run = made.trial_run({"adapter.rank": 8}, seed=1, folder=Path("somewhere/trials/001"))
    assert run.output_dir == "somewhere/trials/001" and run.train.seed == 1


@pytest.mark.parametrize(
    ("content", "keep", "said"),
    [
        ('{"words": [], "config_dir": null, "config_name": null}', 0, "keep must be at least 1"),
        ('{"words": null, "config_dir": null, "config_name": null}', 1, "needs the folder of a sweep"),
        ('{"words": [3], "config_dir": null, "config_name": null}', 1, "needs the folder of a sweep"),
        ("[" * 100_000, 1, "needs the folder of a sweep"),
    ],
)
def test_a_sweep_that_can_not_be_resumed_is_refused(tmp_path: Path, content: str, keep: int, said: str):
    (tmp_path / COMMAND).write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_paused([str(tmp_path), f"keep={keep}"])


def test_an_experiment_that_is_a_sweep_can_be_submitted():
    submitted = load_submitted(["+experiment=tune_smollm2", "submit.max_mib=7"])
    assert submitted.submit.max_mib == 7
    assert submitted.sweep.run.resources.name == "cluster"
    with pytest.raises(ConfigError, match=r"submit\.max_mb is no setting"):
        load_submitted(["+experiment=tune_smollm2", "submit.max_mb=7"])
    with pytest.raises(ConfigError, match=r"submit\.max_mib must be a"):
        load_submitted(["+experiment=tune_smollm2", "submit.max_mib=much"])


def test_a_submitted_sweep_takes_from_the_config_what_a_submitted_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["+experiment=sft_smollm2", "optimizer.lr=1e-4,1e-3"]
    run = load_config("submit", ["+experiment=sft_smollm2"])
    swept = load_submitted(words).sweep.run
    assert swept.resources == run.resources and swept.resources.name == "cluster"
    assert (swept.data.cache, run.data.cache) == (f"{swept.output_dir}/tokens", f"{run.output_dir}/tokens")
    assert load_submitted([*words, "data.cache=/mine"]).sweep.run.data.cache == "/mine"

    text = (CONF / "submit.yaml").read_text()
    (tmp_path / "submit.yaml").write_text(text.replace("data:\n", "data:\n  max_length: 77\n"))
    monkeypatch.setattr("raytune_llm.config.sweep.CONF", tmp_path)
    assert load_submitted(words).sweep.run.data.max_length == 77
    assert load_submitted([*words, "data.max_length=99"]).sweep.run.data.max_length == 99

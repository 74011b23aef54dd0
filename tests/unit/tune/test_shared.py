"""Sweeps whose trials share a base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_llm import ConfigError, api, load_config, load_sweep
from raytune_llm.config.sharing import obstacle
from raytune_llm.memory.footprint import estimate, needs_together
from raytune_llm.models.build import run_config
from raytune_llm.report.metrics import read_metrics
from raytune_llm.runs.build import Builder
from raytune_llm.runs.together import Room, room_for
from raytune_llm.runs.workspace import Workspace
from raytune_llm.tune.shared import trials_together

GRID = ("optimizer.lr=1e-9,1e-2,1e-8", "adapter.rank=2,4", "tune=grid", "tune.scheduler=asha", "tune.grace=0.5")


def words(rows, cache, folder, *more):
    return [
        "model=tiny_random", "resources=inline", "tracking=none", "train.precision=fp32", "train.log_every_steps=1",
        "train.global_batch_size=4", "train.max_steps=4", "train.eval_every_steps=1", "data.max_length=64",
        "data.eval_fraction=0.1", "checkpoint.every_steps=1", "tune.share_base=true",
        f"data.path={rows}", f"data.cache={cache}", f"output_dir={folder}", *more,
    ]  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [record["eval_loss"] for record in read_metrics(folder / "metrics.jsonl") if "eval_loss" in record]


@pytest.fixture(scope="module")
def both(chat_rows, cache, tmp_path_factory):
    """The same sweep with one pass for all trials, and with trials one after another."""
    folders = [tmp_path_factory.mktemp(name) for name in ("shared", "alone")]
    told: list[str] = []
    shared = api.tune(load_sweep(words(chat_rows, cache, folders[0], *GRID)), notify=told.append)
    alone = api.tune(load_sweep(words(chat_rows, cache, folders[1], *GRID, "tune.share_base=false")), notify=told.append)
    assert told == ["6 trials at a time, in one pass over one base (asked for)"]
    return shared, alone


def test_trials_that_share_a_base_come_to_the_results_of_trials_alone(both):
    shared, alone = both
    for mine, its in zip(shared.study.trials, alone.study.trials, strict=True):
        assert (mine.point, mine.state, mine.step) == (its.point, its.state, its.step)
        assert mine.latest == pytest.approx(its.latest, abs=1e-6)
    assert {trial.state for trial in shared.study.trials} == {"finished", "stopped"}
    assert shared.best.point == alone.best.point


def test_the_best_model_is_kept_as_a_run_leaves_it(both):
    shared, alone = both
    names = {str(path.relative_to(alone.folder)) for path in alone.folder.rglob("*") if path.is_file()}
    assert {str(path.relative_to(shared.folder)) for path in shared.folder.rglob("*") if path.is_file()} == names
    finals = (shared.study.sweep.folder / "trials").glob("*/final")
    assert [final.parent for final in finals] == [shared.folder]
    run = load_config("train", ["resume=must"], config_dir=shared.folder, config_name="run")
    assert api.train(run).already_done


@pytest.mark.long
def test_a_sweep_that_ends_in_the_middle_goes_on_where_it_was(chat_rows, cache, tmp_path, both):
    class Cut(BaseException):
        pass

    def cut(study, trial):
        if trial.number == 1 and trial.step == 2:
            raise Cut

    with pytest.raises(Cut):
        api.tune(load_sweep(words(chat_rows, cache, tmp_path, *GRID)), on_change=cut)
    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *GRID)))
    whole, _ = both
    for mine, its in zip(result.study.trials, whole.study.trials, strict=True):
        assert (mine.state, mine.step) == (its.state, its.step)
        assert losses(mine.folder) == pytest.approx(losses(its.folder), abs=1e-6)


def test_a_trial_that_breaks_ends_with_its_reason_and_the_others_go_on(chat_rows, cache, tmp_path):
    more = ("optimizer.lr=1e-3,1e30", "tune=grid", "train.max_nonfinite_steps=0", "train.max_grad_norm=null")
    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *more)))
    assert [trial.state for trial in result.study.trials] == ["finished", "failed"]
    assert "loss" in result.study.trials[1].reason or "gradient" in result.study.trials[1].reason


@pytest.mark.long
def test_repeated_seeds_draw_other_adapters_over_the_same_packs(chat_rows, cache, tmp_path):
    more = ("optimizer.lr=1e-3,1e-2", "tune=grid", "tune.seeds=2", "train.max_steps=2")
    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *more)))
    runs = [load_config("train", [], config_dir=trial.folder, config_name="run") for trial in result.study.trials]
    assert [(run.train.seed, run.train.adapter_seed) for run in runs] == [(42, 42), (42, 43)] * 2
    first, second = (losses(trial.folder) for trial in result.study.trials[:2])
    assert first != second
    kept = {path.parent for path in (tmp_path / "trials").glob("*/final")}
    assert kept == {trial.folder for trial in result.best.trials}


def test_passes_of_a_few_trials_each_come_to_the_results_of_one_pass(both, chat_rows, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Builder, "at_once", property(lambda builder: 4))
    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *GRID)))
    for mine, its in zip(result.study.trials, both[1].study.trials, strict=True):
        assert (mine.point, mine.state, mine.step) == (its.point, its.state, its.step)
        assert mine.latest == pytest.approx(its.latest, abs=1e-6)


def test_a_pass_is_of_as_many_trials_as_fit_without_computing_activations_again(chat_rows, cache, tmp_path):
    given = [word for word in words(chat_rows, cache, tmp_path) if not word.startswith(("tune.", "data.max_length"))]
    run = load_config("train", [*given, "data.max_length=1024"])
    tokenizer, _ = Workspace().tokenizer_of(run)
    config = run_config(run.model, tokenizer, 1024, packing=True)
    needs = needs_together(Builder(run, config, torch.device("cpu")).needs, 16, 4)
    room = 1.01 * estimate(run, config, needs).total
    for usable, at_once in ((room, 4), (100 * room, 16)):
        builder = Builder(run, config, torch.device("cpu"), together=[run] * 16)
        builder.usable_bytes = usable
        assert (builder.at_once, builder.needs.checkpointing) == (at_once, "none")


def test_trials_share_a_quantized_base(chat_rows, cache, tmp_path):
    more = ("optimizer.lr=1e-3,1e-2", "tune=grid", "quantization=bnb_nf4", "train.max_steps=2")
    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *more)))
    assert [trial.state for trial in result.study.trials] == ["finished", "finished"]


def room(*, usable: float, alone: float, together: int) -> Room:
    """In GiB."""
    return Room(usable_bytes=usable * 2**30, alone_bytes=alone * 2**30, pair_bytes=1.1 * alone * 2**30, together=together)


def together(rows, cache, folder, found: Room, *more: str, gpus: int = 1) -> tuple[int, str]:
    given = [word for word in words(rows, cache, folder) if not word.startswith(("tune.", "resources", "data.max_length"))]
    made = load_sweep([*given, "optimizer.lr=1e-4,1e-3,1e-2,1e-5,2e-5", "tune=grid", *more])
    return trials_together(made, lambda run: found, gpus=gpus)


LONG, SHORT = "data.max_length=4096", "data.max_length=256"
BIG = room(usable=73.0, alone=20.0, together=16)
"""Three bases fit beside each other."""


@pytest.mark.parametrize(
    ("more", "gpus", "size", "why"),
    [
        (["resources=inline", SHORT], 1, 5, "passes of 256 tokens leave the GPU idle"),
        (["resources=inline", LONG], 1, 1, ""),
        (["resources=inline", SHORT], 0, 1, ""),
        (["resources=inline", SHORT, "tune.share_base=false"], 1, 1, ""),
        (["resources=inline", SHORT, "tune.scheduler=median"], 1, 1, ""),
        (["resources=inline", LONG, "tune.share_base=true", "tune.max_concurrent=3"], 1, 3, "asked for"),
        (["resources=local", LONG, "tune.max_concurrent=4"], 1, 4, "4 processes of 20.0 GiB don't fit the GPU's usable 73.0 GiB"),
        (["resources=local", LONG, "tune.max_concurrent=3"], 1, 1, ""),
        (["resources=local", LONG], 1, 1, ""),
        (["resources=local", LONG, "tune.max_concurrent=4"], 2, 1, ""),
        (["resources=local", LONG, "tune.max_concurrent=4", "adapter.targets=[q_proj],[v_proj]"], 1, 1, ""),
        (["resources=local", LONG, "tune.max_concurrent=4", "resources.num_workers=2"], 1, 1, ""),
    ],
)
def test_trials_share_a_base_where_it_pays_or_where_several_do_not_fit(more, gpus, size, why, chat_rows, cache, tmp_path):
    assert together(chat_rows, cache, tmp_path, BIG, *more, gpus=gpus) == (size, why)


def test_one_pass_in_which_not_even_two_trials_fit_is_refused_with_what_they_need(chat_rows, cache, tmp_path):
    small = room(usable=21.0, alone=20.0, together=1)
    with pytest.raises(ConfigError) as refused:
        together(chat_rows, cache, tmp_path, small, "resources=inline", LONG, "tune.share_base=true")
    assert "tune.share_base can't be true where not even two trials fit in one pass" in str(refused.value)
    assert "two trials need 22.0 GiB of the usable 21.0 GiB, got True. Lower train.micro_batch_size" in str(refused.value)
    assert together(chat_rows, cache, tmp_path, small, "resources=inline", SHORT)[0] == 1
    assert together(chat_rows, cache, tmp_path, small, "resources=local", LONG, "tune.max_concurrent=2") == (1, "")


def test_one_more_trial_in_a_pass_takes_an_adapter_and_its_rows(chat_rows, cache, tmp_path):
    run = load_config("train", [word for word in words(chat_rows, cache, tmp_path) if not word.startswith("tune.")])
    found = room_for(run, torch.device("cpu"), Workspace())
    assert found.together == 16 and found.alone_bytes < found.pair_bytes < 2 * found.alone_bytes


@pytest.mark.parametrize(
    ("value", "setting"),
    [
        ("data.max_length=64,32", "data.max_length"),
        ("train.global_batch_size=4,8", "train.global_batch_size"),
        ("adapter.targets=[q_proj],[q_proj,v_proj]", "adapter.targets"),
        ("adapter=lora,dora", "adapter"),
        ("quantization=none,fp8", "quantization"),
        ("stage=sft,pretrain", "stage"),
        ("stage.neftune_alpha=5,10", "stage.neftune_alpha"),
        ("train.precision=fp32,bf16", "train.precision"),
    ],
)
def test_what_trials_over_one_base_cannot_vary_is_refused_by_name(value, setting, chat_rows, cache, tmp_path):
    given = [word for word in words(chat_rows, cache, tmp_path) if not word.startswith(value.partition("=")[0] + "=")]
    with pytest.raises(ConfigError) as caught:
        load_sweep([*given, value, "tune=grid"])
    assert caught.value.setting.startswith(setting) and "tune.share_base=true" in str(caught.value)
    assert load_sweep([*given, value, "tune=grid", "tune.share_base=auto"]).unshared is not None
    assert not list(Path(tmp_path).iterdir())


def test_a_tracker_that_has_one_run_a_process_is_refused_for_trials_in_one_pass(chat_rows, cache, tmp_path):
    given = [word for word in words(chat_rows, cache, tmp_path, "adapter.rank=2,4") if not word.startswith("tracking")]
    with pytest.raises(ConfigError, match=r"tracking must be .* where tune\.share_base=true, got 'swanlab'"):
        load_sweep([*given, "tracking=swanlab"])
    load_sweep([*given, "tracking=wandb"])


def test_what_trials_can_vary_is_no_obstacle(chat_rows, cache, tmp_path):
    base = words(chat_rows, cache, tmp_path)
    base = [word for word in base if not word.startswith("tune.")]
    others = ("adapter=rslora", "optimizer=muon", "schedule=wsd", "adapter.dropout=0.1", "stage.label_smoothing=0.1",
              "train.max_steps=9", "train.adapter_seed=3", "checkpoint.final=best", "train.max_grad_norm=null")  # fmt: skip
    run = load_config("train", base)
    for other in others:
        assert obstacle(load_config("train", [*base, other]), run) is None, other


PROMOTED = (
    "optimizer.lr=1e-9,1e-5,1e-4,1e-3,1e-2,2e-2",
    "tune=grid",
    "tune.scheduler=asha",
    "tune.grace=0.5",
    "tune.reduction=2",
)


def test_trials_that_resume_from_a_rung_share_a_bank_with_those_that_begin(chat_rows, cache, tmp_path):
    together = words(chat_rows, cache, tmp_path / "shared", *PROMOTED, "tune.max_concurrent=4")
    shared = api.tune(load_sweep(together))
    apart = words(chat_rows, cache, tmp_path / "alone", *PROMOTED, "tune.share_base=false")
    alone = api.tune(load_sweep(apart))
    states = [(trial.point, trial.state, trial.step, trial.reason) for trial in shared.study.trials]
    assert states == [(trial.point, trial.state, trial.step, trial.reason) for trial in alone.study.trials]
    assert [state for _, state, _, _ in states].count("finished") == 3
    for mine, its in zip(shared.study.trials, alone.study.trials, strict=True):
        assert mine.latest == pytest.approx(its.latest, abs=1e-6)


@pytest.mark.parametrize("shared", ["true", "false"])
def test_a_loss_that_is_no_number_at_a_rung_ends_the_trial_there(shared, chat_rows, cache, tmp_path):
    broken = ("optimizer.lr=1e-3,1e30,1e-2", "train.max_nonfinite_steps=9", "train.max_grad_norm=null")
    asha = ("tune=grid", "tune.scheduler=asha", "tune.grace=0.75", f"tune.share_base={shared}")
    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *broken, *asha)))
    assert [trial.state for trial in result.study.trials] == ["stopped", "failed", "finished"]
    assert "the loss at step 3 is nan" in result.study.trials[1].reason

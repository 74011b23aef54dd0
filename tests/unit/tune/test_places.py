"""Trials at the same time: how many, and a study that hears each of them."""

from __future__ import annotations

import threading

import pytest

from raytune_llm import ConfigError, load_config, load_sweep
from raytune_llm.tune.conduct import Conduct
from raytune_llm.tune.metric import metric_of
from raytune_llm.tune.places import Share, run_at, share_of
from raytune_llm.tune.study import Study
from raytune_llm.tune.trial import Outcome


@pytest.mark.parametrize(
    ("words", "there", "most", "fit", "share"),
    [
        ([], {"CPU": 2}, None, 9, Share(count=2, cpus=1, gpus=0)),
        ([], {"CPU": 8}, None, 3, Share(count=3, cpus=1, gpus=0)),  # what the host's memory holds
        ([], {"CPU": 8}, 2, 9, Share(count=2, cpus=4, gpus=0)),
        ([], {"CPU": 16, "GPU": 1}, None, 3, Share(count=3, cpus=1, gpus=0.3333)),
        ([], {"CPU": 4, "GPU": 8}, None, 1, Share(count=8, cpus=0.5, gpus=1)),
        ([], {"CPU": 64, "GPU": 8}, 5, 2, Share(count=5, cpus=1, gpus=0.5)),
        (["resources.gpus_per_worker=1"], {"CPU": 64, "GPU": 8}, None, 4, Share(count=8, cpus=1, gpus=1)),
        (["resources.num_workers=8"], {"CPU": 64, "GPU": 24}, None, 1, Share(count=3, cpus=1, gpus=1)),
        (["resources.num_workers=2"], {"CPU": 5}, None, 1, Share(count=2, cpus=1, gpus=0)),
        (["resources.cpus_per_worker=4"], {"CPU": 9}, None, 9, Share(count=2, cpus=4, gpus=0)),
    ],
)
def test_as_many_trials_run_at_once_as_there_is_room_for(words, there, most, fit, share):
    resources = load_config("train", ["data.path=x", "resources=local", *words]).resources
    assert share_of(resources, there, most=most, fit=fit) == share


@pytest.mark.parametrize(
    ("words", "there"), [(["resources.num_workers=4"], {"CPU": 3}), (["resources.gpus_per_worker=2"], {"CPU": 9, "GPU": 1})]
)
def test_a_trial_without_a_place_is_refused(words, there):
    resources = load_config("train", ["data.path=x", "resources=local", *words]).resources
    with pytest.raises(ConfigError, match=r"resources\.num_workers with"):
        share_of(resources, there, most=None, fit=1)


def study_of(tmp_path, *words):
    sweep = load_sweep(
        ["data.path=x", "model=tiny_random", "data.eval_fraction=0.1", "tune=grid", f"output_dir={tmp_path}", *words]
    )
    return Study(sweep, metric_of(sweep.tune))


def test_places_work_at_the_same_time_and_each_hears_its_own_answers(tmp_path):
    study = study_of(tmp_path, "optimizer.lr=1e-4,1e-3,1e-2,2e-2", "tune.scheduler=hyperband", "tune.grace=0.5")
    both = threading.Barrier(2, timeout=20)

    def place(run, reported):
        """The smaller the rate the better; all of a pair begin before one of them reports."""
        both.wait()
        for step in (1, 2):
            if not reported(step, 2, run.optimizer.lr):
                return Outcome(state="stopped", value=run.optimizer.lr)
        return Outcome(state="finished", value=run.optimizer.lr)

    try:
        run_at([place, place], Conduct(study, lambda study, trial: None))
    finally:
        study.close()
    assert len(study.trials) == 4
    assert study.ranked[0].point == {"optimizer.lr": 1e-4}
    assert {trial.state for trial in study.trials[2:]} == {"stopped"}
    assert (tmp_path / "trials.csv").exists()  # written as trials end


def test_what_a_place_raises_ends_the_sweep(tmp_path):
    study = study_of(tmp_path, "optimizer.lr=1e-4,1e-3")

    def place(run, reported):
        raise ConfigError("tune.metric", "must be a figure")

    try:
        with pytest.raises(ConfigError, match="must be a figure"):
            run_at([place], Conduct(study, lambda study, trial: None))
    finally:
        study.close()

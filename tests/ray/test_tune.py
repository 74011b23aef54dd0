"""Trials on Ray have the numbers of one process, also when an actor is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from raytune_llm import api, load_sweep
from raytune_llm.report.metrics import read_metrics
from tests.ray.head import head_without_cpus, kill, node, wait_for_cpus

pytestmark = pytest.mark.ray


def words(rows, cache, folder, *more):
    return [
        "model=tiny_random", "tracking=none", "train.precision=fp32", "train.log_every_steps=1",
        "train.global_batch_size=4", "train.max_steps=4", "train.eval_every_steps=1", "checkpoint.every_steps=1",
        "data.max_length=64", "data.eval_fraction=0.1",
        f"data.path={rows}", f"data.cache={cache}", f"output_dir={folder}", *more,
    ]  # fmt: skip


def numbers(folder):
    trials = json.loads((folder / "results.json").read_text())["trials"]
    losses = [
        [record["eval_loss"] for record in read_metrics(Path(trial["folder"]) / "metrics.jsonl") if "eval_loss" in record]
        for trial in trials
    ]
    return [(trial["settings"], trial["state"], trial["metric"], trial["step"]) for trial in trials], losses


def processes_of(name):
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and name in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def test_trials_in_actors_are_those_of_one_process_also_when_one_is_killed(chat_rows, cache, tmp_path):
    grid = ("optimizer.lr=1e-3,1e-2", "adapter.rank=2,4", "tune=grid")
    api.tune(load_sweep(words(chat_rows, cache, tmp_path / "here", *grid, "resources=inline")))
    before, killed = set(processes_of(b"ray::TrialProcess")), []

    def kill_one(study, trial):
        if trial.number == 1 and trial.step == 2 and trial.state == "running" and not killed:
            killed.extend(set(processes_of(b"ray::TrialProcess")) - before)
            os.kill(killed[0], signal.SIGKILL)

    local = ("resources=local", "tune.max_concurrent=2")
    sweep = load_sweep(words(chat_rows, cache, tmp_path / "there", *grid, *local))
    result = api.tune(sweep, on_change=kill_one)
    assert len(killed) == 2  # two at once
    assert numbers(tmp_path / "there") == numbers(tmp_path / "here")
    assert (result.folder / "final" / "adapter_model.safetensors").exists()
    until = time.monotonic() + 20
    while set(processes_of(b"ray::TrialProcess")) - before:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.long
def test_a_trial_that_resumes_from_a_rung_does_so_where_one_actor_was_killed_meanwhile_and_one_stands_still(
    chat_rows, cache, tmp_path
):
    grid = ("optimizer.lr=1e-3,1e-2", "adapter.rank=2,4", "tune=grid", "tune.scheduler=asha", "tune.grace=0.25")
    api.tune(load_sweep(words(chat_rows, cache, tmp_path / "here", *grid, "resources=inline")))
    before, killed = set(processes_of(b"ray::TrialProcess")), []

    def kill_all(study, trial):
        if trial.round == 1 and trial.state == "running" and not killed:
            killed.extend(set(processes_of(b"ray::TrialProcess")) - before)
            for process, how in zip(killed, (signal.SIGKILL, signal.SIGSTOP), strict=True):
                os.kill(process, how)

    local = ("resources=local", "tune.max_concurrent=2", "resources.collective_timeout_s=8")
    sweep = load_sweep(words(chat_rows, cache, tmp_path / "there", *grid, *local))
    api.tune(sweep, on_change=kill_all)
    assert len(killed) == 2 and not [process for process in killed if Path(f"/proc/{process}").exists()]
    assert numbers(tmp_path / "there") == numbers(tmp_path / "here")


@pytest.mark.long
def test_a_group_of_workers_that_is_stopped_early_frees_its_place(chat_rows, cache, tmp_path):
    stopped = ("optimizer.lr=1e-2,1e-9", "tune=grid", "tune.scheduler=asha", "tune.grace=0.5")
    sweep = load_sweep(words(chat_rows, cache, tmp_path, *stopped, "resources=local", "resources.num_workers=2"))
    result = api.tune(sweep)
    assert [trial.state for trial in result.study.trials] == ["finished", "stopped"]
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] or processes_of(b"ray::RayTrainWorker"):
        assert time.monotonic() < until, ray.available_resources()
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_trial_whose_node_is_gone_finds_a_place_where_another_one_has_nothing_to_train(chat_rows, cache, tmp_path):
    grid = ("optimizer.lr=1e-3,1e-2,1e-4", "tune=grid", "tune.scheduler=asha", "tune.grace=0.5", "train.max_steps=8")
    api.tune(load_sweep(words(chat_rows, cache, tmp_path / "here", *grid, "resources=inline")))
    there = words(chat_rows, cache, tmp_path / "there", *grid, "resources=cluster", "resources.preflight=off")
    with head_without_cpus() as address:
        nodes = []
        try:
            ray.init(address=address, log_to_driver=False)
            for number in (1, 2):  # one after another: two that start at once may take the same names of sockets
                nodes.append(node(address))
                wait_for_cpus(number)
            ray.shutdown()
            command = [sys.executable, "-m", "raytune_llm", "tune", *there, f"resources.address={address}"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
                try:
                    while not list(tmp_path.glob("there/trials/*/checkpoints/step-4/COMPLETE")):
                        assert sweep.poll() is None, sweep.communicate()
                        time.sleep(0.05)
                    kill(nodes[1])
                    said, _ = sweep.communicate(timeout=900)
                finally:
                    sweep.kill()
        finally:
            for one in nodes:
                kill(one)
    assert sweep.returncode == 0, said
    assert numbers(tmp_path / "there") == numbers(tmp_path / "here")


@pytest.mark.long
def test_many_trials_one_after_another_leave_the_memory_of_their_actor_as_it_was(chat_rows, cache, tmp_path):
    scales = ("adapter.alpha=range(1,25)", "tune=grid", "tune.scheduler=asha", "tune.grace=0.5", "train.max_steps=2")
    alone = ("resources=local", "tune.max_concurrent=1")
    before, resident = set(processes_of(b"ray::TrialProcess")), {}

    def look(study, trial):
        if trial.state == "running" and not trial.reports:
            for process in set(processes_of(b"ray::TrialProcess")) - before:
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
                resident[trial.number] = process, pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    result = api.tune(load_sweep(words(chat_rows, cache, tmp_path, *scales, *alone)), on_change=look)
    assert len(result.study.trials) == 24 and not [trial for trial in result.study.trials if trial.state == "failed"]
    assert len({process for process, _ in resident.values()}) == 1
    mib = {number: size for number, (_, size) in resident.items()}
    assert mib[23] - mib[8] < 7.5, mib  # half a MiB a trial: one that keeps its model keeps more

"""Training through Ray: the numbers of one process, also when a worker is killed in the middle."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from raytune_llm import api, load_config, session
from raytune_llm.config.resources import Cluster, Local, uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.report.updates import Notice, RunStarted
from raytune_llm.runs.group_trainer import GroupTrainer
from raytune_llm.runs.ray_failures import why_not_started
from raytune_llm.runs.ray_metrics import GAUGES, PREFIX
from tests.group import metrics
from tests.invariant.test_same_run_everywhere import SAMPLED, assert_same_run
from tests.runs import tiny_run

pytestmark = pytest.mark.ray
EXPORTED = {f"ray_{PREFIX}{name}" for name in GAUGES if name != "mfu"}
"""A CPU has no mfu: nobody knows its peak."""


@pytest.fixture(scope="module")
def plain(chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("plain"), "checkpoint.every_steps=2", "train.epochs=20", *SAMPLED)
    api.train(run)
    return run


def on_ray(run: TrainRun, folder: Path, *overrides: str) -> TrainRun:
    resources = load_config("train", ["data.path=x", "resources=local", "resources.num_workers=2", *overrides]).resources
    return replace(run, output_dir=str(folder), resources=resources)


def resources_of(run: TrainRun) -> Local | Cluster:
    assert uses_ray(run.resources)
    return run.resources


def metrics_of_this_node() -> set[str]:
    """Names of what Prometheus would find of runs."""
    import ray

    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return set(re.findall(r"^(ray_raytune_llm_\w+)\{", answer.read().decode(), re.MULTILINE))


def worker_processes() -> set[int]:
    """Of the cluster that this process is connected to: another test's may still be ending."""
    import psutil
    import ray

    if not ray.is_initialized():
        return set()
    session = ray.get_runtime_context().get_session_name()
    found = set[int]()
    for process in psutil.process_iter():
        try:
            raylet = process.parent() if "TrainWorker" in " ".join(process.cmdline()) else None
            if raylet and session in " ".join(raylet.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue  # it has ended meanwhile
    return found


def test_a_worker_killed_in_the_middle_does_not_show(plain: TrainRun, tmp_path: Path) -> None:
    run = on_ray(plain, tmp_path)
    killed: list[int] = []
    heard: list[int] = []
    begun: list[int] = []

    exported: set[str] = set()
    earlier = worker_processes()

    def kill_one(record: Mapping[str, Any]) -> None:
        heard.append(record["step"])
        if killed and not exported >= EXPORTED:
            exported.update(metrics_of_this_node())
        if record["step"] >= 5 and not killed:
            victim = min(worker_processes() - earlier)
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    told: list[Any] = []
    notices: list[str] = []

    def begin(update: Any) -> None:
        if isinstance(update, RunStarted):
            begun.append(update.first_step)
        elif isinstance(update, Notice):
            notices.append(update.text)

    of_a_killed_driver = tmp_path / ".ray" / "1234"
    of_a_killed_driver.mkdir(parents=True)
    result = api.train(run, sinks=[kill_one], on_update=begin, on_samples=told.append)
    assert killed
    assert not (tmp_path / ".ray").exists()
    [line] = [notice for notice in notices if "failure 1 of 3" in notice]
    assert re.fullmatch(
        r"worker [01] on [\d.]+ died \(killed\); starting again from step \d+, failure 1 of 3 within an hour \(.*workers\.log.*",
        line,
    )
    assert "died" in (tmp_path / "workers.log").read_text()
    until = time.monotonic() + 20  # Ray exports what it has every ten seconds
    while not exported >= EXPORTED and time.monotonic() < until:
        time.sleep(0.5)
        exported.update(metrics_of_this_node())
    assert exported >= EXPORTED
    assert begun[0] == 0
    assert begun[1] >= 4, "the group resumed from a checkpoint"
    assert result.summary.world_size == 2
    assert_same_run(plain, run)
    assert heard[-1] == metrics(run.output_dir)[-1]["step"] == told[-1][0].step


def test_a_mistake_that_only_a_worker_can_see_comes_back_as_it_is(plain: TrainRun, tmp_path: Path) -> None:
    run = on_ray(replace(plain, adapter=replace(plain.adapter, targets=["nothing_like_it"])), tmp_path)
    with pytest.raises(ConfigError, match=r"adapter\.targets .* It has .*q_proj"):
        api.train(run)


def test_a_run_on_ray_trains_while_ray_tokenizes(plain: TrainRun, tmp_path: Path) -> None:
    rows = Path(plain.data.path or "").read_text().splitlines(keepends=True)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(rows * 150))  # some MB, so several chunks
    settings = ["data.streaming=true", "data.streaming_buffer_rows=500", "data.eval_fraction=0", "train.epochs=1"]
    settings += ["train.max_steps=8", "checkpoint.every_steps=4"]
    here, there = (tiny_run(str(path), str(tmp_path / name), tmp_path / f"{name}-run", *settings) for name in ("here", "there"))
    api.train(here)
    api.train(replace(there, resources=on_ray(there, tmp_path).resources))
    assert_same_run(here, there)


def test_more_workers_than_the_machine_has_are_refused_at_once(plain: TrainRun, tmp_path: Path) -> None:
    run = on_ray(plain, tmp_path, "resources.cpus_per_worker=64")
    with pytest.raises(ConfigError, match="CPUs that there are"):
        api.train(run)


def test_a_cluster_that_does_not_answer_is_named(plain: TrainRun, tmp_path: Path) -> None:
    session.connect(resources_of(on_ray(plain, tmp_path)))  # the run would train there
    resources = load_config("train", ["data.path=x", "resources=cluster", "resources.address=127.0.0.1:1"]).resources
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        api.train(replace(plain, output_dir=str(tmp_path), resources=resources))


def test_a_frozen_worker_is_named_and_the_run_goes_on(plain: TrainRun, tmp_path: Path) -> None:
    run = on_ray(plain, tmp_path, "resources.collective_timeout_s=20")
    run = replace(run, train=replace(run.train, stall_timeout_s=5.0))
    frozen: list[int] = []
    notices: list[str] = []
    earlier = worker_processes()

    def freeze_one(record: Mapping[str, Any]) -> None:
        if record["step"] >= 3 and not frozen:
            frozen.append(min(worker_processes() - earlier))
            os.kill(frozen[0], signal.SIGSTOP)

    api.train(
        run, sinks=[freeze_one], on_update=lambda update: notices.append(update.text) if isinstance(update, Notice) else None
    )
    assert any(re.match(r"worker [01] on [\d.]+ has not answered for \d+ s", notice) for notice in notices), notices
    assert any("waits for the others" in notice for notice in notices), notices
    assert any("starting again from step" in notice for notice in notices), notices
    assert_same_run(plain, run)


@pytest.mark.parametrize(
    ("when", "number", "code"), [("starting the workers", signal.SIGTERM, 143), ("step 1/", signal.SIGINT, 130)]
)
def test_a_signal_ends_a_run_on_ray_at_once(plain: TrainRun, tmp_path: Path, number: int, code: int, when: str) -> None:
    """Each signal once, and each moment once: SIGTERM is a Ctrl-C with another exit code (interrupts.py)."""
    command = [
        "model=tiny_random", "resources=local", "resources.num_workers=2", "train.epochs=5000", "train.log_every_steps=1",
        "train.global_batch_size=2", "data.max_length=128", "data.eval_fraction=0", f"data.path={plain.data.path}",
        f"data.cache={plain.data.cache}", f"output_dir={tmp_path / 'o'}", "tracking=none",
    ]  # fmt: skip
    log = (tmp_path / "log").open("w+")
    running = subprocess.Popen([sys.executable, "-m", "raytune_llm", *command], stdout=log, stderr=log, text=True)
    deadline = time.monotonic() + 240
    while when not in (tmp_path / "log").read_text() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.2)
    running.send_signal(number)
    assert running.wait(60) == code, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "the same command" in said and "Traceback" not in said and "@" not in said, said
    if "precision:" not in said:  # the first line of a group that has started
        assert "starting the workers: done" not in said


def test_a_run_whose_cpus_are_taken_says_what_it_waits_for_as_long_as_it_takes(
    plain: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    run = on_ray(plain, tmp_path, "resources.cpus_per_worker=1", "resources.max_failures=0")
    session.connect(resources_of(run))
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0.3")  # so often Ray gives up and asks for a place again
    total = ray.cluster_resources()["CPU"]
    holder: Any = ray.remote(num_cpus=total)(Holder).remote()
    ray.get(holder.hold.remote())
    told: list[str] = []

    def release(update: Any) -> None:
        if not isinstance(update, Notice):
            return
        told.append(update.text)
        if update.text.startswith("waiting for"):
            ray.kill(holder)
            monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")

    result = api.train(run, on_update=release)
    assert f"waiting for 2 workers of 1 CPU; the cluster has 0 of {total:g} CPUs free" in told
    assert result.summary.world_size == 2


class Holder:
    def hold(self) -> None:
        pass


def forever(settings: Mapping[str, Any]) -> None:
    while True:
        time.sleep(0.1)


@pytest.mark.parametrize("when", ["waits for its place", "runs"])
def test_a_group_that_is_ended_leaves_nothing_on_the_cluster(plain: TrainRun, tmp_path: Path, when: str) -> None:
    import ray
    from ray._private.state import actors
    from ray.util import placement_group_table

    session.connect(resources_of(on_ray(plain, tmp_path)))
    total = ray.cluster_resources()["CPU"]
    size = ScalingConfig(num_workers=1, resources_per_worker={"CPU": total})
    config = RunConfig(storage_path=str(tmp_path))
    trainer = GroupTrainer(
        forever,
        again=lambda error: False,
        starts_within_s=300,
        train_loop_config={},
        scaling_config=size,
        run_config=config,
    )
    holder: Any = ray.remote(num_cpus=1)(Holder).remote()
    ray.get(holder.hold.remote())
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    wait_until(lambda: any(place["state"] == "PENDING" for place in placement_group_table().values()))
    if when == "runs":
        ray.kill(holder)
        wait_until(lambda: bool(worker_processes()))
    trainer.end()
    thread.join(60)
    assert not thread.is_alive() and failures
    ray.kill(holder)
    wait_until(lambda: all(place["state"] == "REMOVED" for place in placement_group_table().values()))
    wait_until(lambda: all(actor["State"] == "DEAD" for actor in actors().values()))
    wait_until(lambda: ray.available_resources().get("CPU") == total)


@dataclass
class StandsStillOnce(TorchConfig):
    """The first group's worker stops as it starts: it holds its resources, and does not train yet."""

    seen: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        return StandingStill


class StandingStill(Backend):
    def on_start(self, worker_group: Any, backend_config: StandsStillOnce) -> None:
        worker_group.execute_single(0, stand_still_once, Path(backend_config.seen))


def stand_still_once(seen: Path) -> None:
    if not seen.exists():
        seen.touch()
        os.kill(os.getpid(), signal.SIGSTOP)


def nothing(settings: Mapping[str, Any]) -> None:
    pass


@pytest.mark.long
def test_a_group_whose_worker_stands_still_as_it_starts_is_started_again(plain: TrainRun, tmp_path: Path) -> None:
    import ray

    session.connect(resources_of(on_ray(plain, tmp_path)))
    told: list[str] = []

    def again(error: Exception) -> bool:
        told.append(why_not_started(getattr(error, "controller_failure", error)))
        return True

    GroupTrainer(
        nothing,
        again=again,
        starts_within_s=12,
        train_loop_config={},
        torch_config=StandsStillOnce(seen=str(tmp_path / "seen")),
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=str(tmp_path)),
    ).fit()
    here = ray.util.get_node_ip_address()
    assert (tmp_path / "seen").exists()
    assert f"those on {here} have not all answered within 12 s: a process or a machine stands still" in told


def wait_until(seen: Callable[[], bool]) -> None:
    until = time.monotonic() + 90
    while not seen():
        assert time.monotonic() < until
        time.sleep(0.1)

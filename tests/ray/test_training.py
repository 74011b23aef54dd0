"""Training through Ray: the numbers of one process, also when a worker is killed in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_llm import api, load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, ResourceError
from tests.group import metrics
from tests.invariant.test_same_run_everywhere import SAMPLED, assert_same_run
from tests.runs import tiny_run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def plain(chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("plain"), "checkpoint.every_steps=2", "train.epochs=20", *SAMPLED)
    api.train(run)
    return run


def on_ray(run: TrainRun, folder: Path, *overrides: str) -> TrainRun:
    resources = load_config("train", ["data.path=x", "resources=local", "resources.num_workers=2", *overrides]).resources
    return replace(run, output_dir=str(folder), resources=resources)


def worker_processes() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"TrainWorker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def test_a_worker_killed_in_the_middle_does_not_show(plain: TrainRun, tmp_path: Path) -> None:
    run = on_ray(plain, tmp_path)
    killed: list[int] = []
    heard: list[int] = []
    begun: list[int] = []

    def kill_one(record: Mapping[str, Any]) -> None:
        heard.append(record["step"])
        if record["step"] >= 5 and not killed:
            victim = worker_processes()[0]
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    told: list[Any] = []
    result = api.train(run, sinks=[kill_one], on_begin=lambda begin: begun.append(begin.first_step), on_samples=told.append)
    assert killed
    assert begun[0] == 0
    assert begun[1] >= 4, "the group went on from a checkpoint"
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
    import ray

    ray.shutdown()
    resources = load_config("train", ["data.path=x", "resources=cluster", "resources.address=127.0.0.1:1"]).resources
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        api.train(replace(plain, output_dir=str(tmp_path), resources=resources))

"""A run that grows when a node joins and shrinks when one is lost has the numbers of an undisturbed one."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytune_llm import api, load_config, session
from raytune_llm.config.resources import on_cluster
from raytune_llm.report.updates import Notice, RunStarted, Update
from raytune_llm.runs.elastic import SETTLED_S
from raytune_llm.runs.live_nodes import LOOK_EVERY_S
from tests.group import metrics
from tests.ray.head import head_to_kill, head_without_cpus, kill, node, wait_for_cpus
from tests.runs import tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.long]
CLOSE = {"loss": 2e-4, "grad_norm": 2e-3, "eval_loss": 2e-4}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with head_without_cpus() as found:
        yield found


@contextmanager
def held_up(node: subprocess.Popen[bytes]) -> Iterator[None]:
    """The training worker of a node stands still."""
    (worker,) = [one for one in psutil.Process(node.pid).children(recursive=True) if "RayTrainWorker" in " ".join(one.cmdline())]
    worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.send_signal(signal.SIGCONT)


def test_a_run_follows_the_cluster_s_size_with_the_numbers_of_one_process(
    address: str, chat_rows: str, cache: str, tmp_path: Path
) -> None:
    settings = ["train.global_batch_size=16", "train.max_steps=60", "train.epochs=99", "checkpoint.every_steps=5"]
    settings += ["train.eval_every_steps=20"]
    plain = tiny_run(chat_rows, cache, tmp_path / "plain", *settings)
    words = ["data.path=x", "resources=cluster", f"resources.address={address}", "resources.num_workers=[1,2]"]
    run = replace(
        plain,
        output_dir=str(tmp_path / "elastic"),
        resources=load_config("train", [*words, "resources.max_failures=0"]).resources,
    )
    started: list[int] = []
    notices: list[str] = []
    nodes = [node(address)]

    def follow(record: Mapping[str, Any]) -> None:
        if record["step"] >= 3 and len(nodes) == 1:
            with held_up(nodes[0]):  # or a quick machine is at the last step before the node has joined
                nodes.append(node(address))
                wait_for_cpus(2)
                time.sleep(2 * LOOK_EVERY_S + SETTLED_S)
        if len(nodes) == len(started) == 2 and record["step"] >= started[1] + 7 and nodes[1].poll() is None:
            kill(nodes[1])

    def update(news: Update) -> None:
        if isinstance(news, RunStarted):
            started.append(news.first_step)
        elif isinstance(news, Notice):
            notices.append(news.text)

    try:
        assert on_cluster(run.resources)
        session.connect(run.resources)
        wait_for_cpus(1)
        result = api.train(run, sinks=[follow], on_update=update)
    finally:
        for started_node in nodes:
            kill(started_node)
    first, grown, shrunk = started
    assert first == 0
    assert any(
        line == f"saved at step {grown}, since there is room for 2 workers; resuming with 2 workers (1 before)"
        for line in notices
    ), notices
    assert shrunk > grown and shrunk % 5 == 0, "from the last checkpoint before the loss"
    assert any("a node is gone" in line and "with 1 worker" in line for line in notices), notices
    assert result.summary.steps == 60

    api.train(plain)
    for mine, theirs in zip(metrics(run.output_dir), metrics(plain.output_dir), strict=True):
        assert mine["step"] == theirs["step"] and mine.get("epoch") == theirs.get("epoch")
        for name in CLOSE.keys() & theirs.keys():
            assert math.isclose(mine[name], theirs[name], rel_tol=CLOSE[name], abs_tol=1e-5), (mine["step"], name)


def test_a_run_of_a_fixed_size_leaves_a_node_that_drains_without_losing_a_step_and_waits_for_one_in_place_of_a_lost_one(
    address: str, chat_rows: str, cache: str, tmp_path: Path
) -> None:
    words = ["data.path=x", "resources=cluster", f"resources.address={address}", "resources.num_workers=1"]
    resources = load_config("train", [*words, "resources.max_failures=1"]).resources
    run = tiny_run(chat_rows, cache, tmp_path / "run", "train.max_steps=100", "train.epochs=99", "checkpoint.every_steps=1000")
    run = replace(run, resources=resources)
    started: list[int] = []
    notices: list[str] = []
    nodes = [node(address)]

    def take_away(record: Mapping[str, Any]) -> None:
        if record["step"] >= 3 and len(nodes) == 1:
            [first] = nodes_with_cpus()
            with held_up(nodes[0]):  # or a quick machine is at the last step before the driver has heard
                nodes.append(node(address))
                wait_for_cpus(2)
                drain(address, first)
                time.sleep(2 * LOOK_EVERY_S)
        if len(started) == 2 and record["step"] > started[1]:
            kill(nodes[1])

    def update(news: Update) -> None:
        if isinstance(news, RunStarted):
            started.append(news.first_step)
            if len(started) == 2:
                kill(nodes[0])  # its time is over
        elif isinstance(news, Notice):
            notices.append(news.text)
            if news.text.startswith("waiting for 1 worker of 1 CPU") and len(nodes) == 2:
                nodes.append(node(address))

    try:
        assert on_cluster(run.resources)
        session.connect(run.resources)
        wait_for_cpus(1)
        result = api.train(run, sinks=[take_away], on_update=update)
    finally:
        for started_node in nodes:
            kill(started_node)
    _, resumed, again = started
    assert f"saved at step {resumed}, since a node is being taken away; resuming on others" in notices
    lost = f"starting again from step {resumed}, failure 1 of 1 within an hour"
    assert resumed == again and any(lost in line for line in notices), notices
    assert len(nodes) == 3 and result.summary.steps == 100
    steps = [record["step"] for record in metrics(run.output_dir) if "loss" in record]
    assert steps == list(range(1, 101)) and 3 <= resumed < 100


def test_a_run_whose_head_dies_says_so_and_ends_as_one_that_can_be_started_again(
    chat_rows: str, cache: str, tmp_path: Path
) -> None:
    settings = [
        "model=tiny_random", "data=chat", f"data.path={chat_rows}", f"data.cache={cache}", f"output_dir={tmp_path / 'o'}",
        "resources=cluster", "resources.num_workers=1", "resources.preflight=off",
        "train.epochs=5000", "train.log_every_steps=1", "data.eval_fraction=0", "tracking=none",
    ]  # fmt: skip
    known = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with head_to_kill() as (address, head):
        with (tmp_path / "log").open("w") as log:
            command = [sys.executable, "-m", "raytune_llm", *settings, f"resources.address={address}"]
            driver = subprocess.Popen(command, stdout=log, stderr=log, env=known)
        until = time.monotonic() + 240
        while "step 1/" not in (tmp_path / "log").read_text():
            assert driver.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.2)
        kill(head)
        assert driver.wait(120) == 1
    said = (tmp_path / "log").read_text()
    assert "Ray lost the run" in said and "The same command resumes" in said, said
    assert "Traceback" not in said and "rpc_client" not in said, said


def nodes_with_cpus() -> list[str]:
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def drain(address: str, node_id: str) -> None:
    """As KubeRay's pods do when they are told to end, and an autoscaler for a spot node that goes."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={address}", f"--node-id={node_id}"]
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=300"]
    subprocess.run([*command, *reason], check=True, capture_output=True)

"""A process that stands still is waited for as long as resources.collective_timeout_s says, and then replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from raytune_llm.config.load import load_config
from raytune_llm.errors import RunLost
from raytune_llm.predict.answering import AnsweringOnRay
from raytune_llm.runs.pulse import PULSE_GROUP, Beating
from raytune_llm.runs.remote_task import call_on_node
from raytune_llm.session import connect

pytestmark = pytest.mark.ray


@pytest.fixture
def resources():
    words = ["model=tiny_random", "data.path=rows.jsonl", "resources=local", "resources.collective_timeout_s=1"]
    found = load_config("prepare", words).resources
    connect(found)
    return found


def stand_still():
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_call_in_a_process_that_stands_still_ends_with_its_node_and_the_setting(resources, caplog):
    import ray

    here = ray.util.get_node_ip_address()
    with pytest.raises(
        RunLost, match=rf"a process on {here} has not answered for \d s.*collective_timeout_s=1\)\. The same command resumes"
    ):
        call_on_node(resources, stand_still)
    assert any("it is given up after 1 s" in line for line in caplog.messages)
    assert ray.get(ray.remote(num_cpus=ray.cluster_resources()["CPU"])(alive).remote(), timeout=60), "its CPUs are free"


def alive():
    return True


class Echo(Beating):
    """Answers like predict's actors, and stands still at its first block."""

    def __init__(self, seen: Path) -> None:
        self._seen = seen

    def max_length(self) -> int:
        return 8

    def answer(self, block):
        if not self._seen.exists():
            self._seen.write_text(str(os.getpid()))
            stand_still()
        return block


def test_an_actor_that_stands_still_is_replaced_and_asked_again(resources, tmp_path, caplog, monkeypatch):
    import ray

    options = {"num_cpus": 0.1, "max_restarts": 1, "max_task_retries": 1, "concurrency_groups": PULSE_GROUP}
    actor = ray.remote(**options)(Echo).remote(tmp_path / "seen")
    answering = AnsweringOnRay([actor], 1, {"CPU": 0.1, "GPU": 0.0}, limit_s=3.0)
    assert list(answering([["a"], ["b"]])) == [["a"], ["b"]]
    here = ray.util.get_node_ip_address()
    assert any(f"worker 0 on {here} has not answered" in line and "it is replaced" in line for line in caplog.messages)
    assert not Path(f"/proc/{(tmp_path / 'seen').read_text()}").exists()
    ray.kill(actor)

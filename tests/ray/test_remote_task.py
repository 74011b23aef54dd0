from __future__ import annotations

import os
import time
from functools import partial
from importlib import import_module

import pytest

from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError, ResourceError, RunLost
from raytune_llm.runs.node_calls import answers, on_node
from raytune_llm.runs.remote_task import call_counted, call_on_node
from raytune_llm.runs.trained import read_trained
from raytune_llm.session import connect

pytestmark = pytest.mark.ray


@pytest.fixture
def resources():
    found = load_config("prepare", ["model=tiny_random", "data.path=rows.jsonl", "resources=local"]).resources
    connect(found)
    return found


def test_a_node_runs_a_partial_function_and_raises_what_it_raises(resources):
    assert call_on_node(resources, partial(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ConfigError, match=r"export\.run must be the output folder of a run"):
        call_on_node(resources, partial(read_trained, "/nothing/there", "export.run"))


def test_a_call_tells_how_much_of_it_is_done(resources, tmp_path):
    told: list[tuple[int, int]] = []

    def on_progress(done: int, total: int) -> None:
        told.append((done, total))
        (tmp_path / "told").touch()

    assert call_counted(resources, partial(half, tmp_path / "told"), on_progress) == "all"
    assert set(told) == {(4, 8)}


def half(told, tell):
    tell(4, 8)
    while not told.exists():
        time.sleep(0.05)
    return "all"


def test_a_node_that_is_lost_while_it_is_asked_is_no_traceback_and_one_that_lacks_a_package_is_the_user_s(resources):
    import ray

    [here] = [node["NodeID"] for node in ray.nodes()]
    with pytest.raises(
        ResourceError, match=r"can't report \(.*No module named 'no_such'\)\. Give all nodes the same image"
    ) as lacks:
        answers([on_node(here, import_module).remote("no_such")], "report")
    assert lacks.value.exit_code == 2
    for node in (here, "a" * len(here)):  # a process that dies, and a node that is gone
        with pytest.raises(RunLost, match="a node of the cluster was lost before it could report") as lost:
            answers([on_node(node, lambda: os._exit(1)).remote()], "report")
        assert lost.value.exit_code == 1

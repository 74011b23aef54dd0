"""How many workers fit on a cluster of two nodes of 4 CPUs and 3 (pretended) GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raytune_llm import load_config
from raytune_llm.config.resources import Cluster
from raytune_llm.errors import ConfigError
from raytune_llm.runs.group_size import Waiting, check_fits, group_size, missing_room
from raytune_llm.runs.live_nodes import nodes_there
from raytune_llm.runs.nodes import check_nodes
from tests.ray.head import head_of_nodes

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def nodes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with head_of_nodes([{"num_cpus": 4, "num_gpus": 3}] * 2):
            yield


def resources(*words: str) -> Cluster:
    batch = ["train.global_batch_size=84", "train.micro_batch_size=1"]  # for any number of workers here
    return load_config("train", ["data.path=x", "resources=cluster", *batch, *(f"resources.{word}" for word in words)]).resources


def test_workers_that_no_node_has_room_for_are_not_counted():
    assert group_size(resources()).workers == 6
    assert group_size(resources("gpus_per_worker=2")).workers == 2, "a GPU of each node is left over"
    assert group_size(resources("cpus_per_worker=3")).workers == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["num_workers=3", "gpus_per_worker=2"], "at most 2: so many workers of 1 CPU and 2 GPUs fit"),
        (["num_workers=1", "gpus_per_worker=5"], "at most 0: so many workers of 1 CPU and 5 GPUs fit"),
        (["num_workers=1", "gpus_per_worker=0", "cpus_per_worker=8"], "at most 0: so many workers of 8 CPUs fit"),
        (["num_workers=auto", "gpus_per_worker=4"], "at most 0: so many workers of 1 CPU and 4 GPUs fit"),
        (["num_workers=7"], "times resources.gpus_per_worker=1 must be at most the 6 GPUs that there are"),
    ],
)
def test_workers_that_would_be_spread_over_nodes_are_refused(words: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        check_fits(group_size(resources(*words)))
    check_fits(group_size(resources("num_workers=2", "gpus_per_worker=3", "cpus_per_worker=4")))


def test_an_all_reduce_over_gpus_that_are_in_use_is_left_out():
    import ray

    holders: list[Any] = [ray.remote(num_cpus=0, num_gpus=3)(Holds).remote() for _ in range(2)]
    assert len({ray.get(one.here.remote()) for one in holders}) == 2
    said: list[str] = []
    while ray.available_resources().get("GPU"):
        time.sleep(0.1)
    check_nodes(resources("num_workers=6"), {}, workers=6, each={"CPU": 1, "GPU": 1}, report=said.append)
    assert said[-1] == "all-reduce: not measured, since all GPUs of 2 of 2 nodes are in use"
    for one in holders:
        ray.kill(one)
    while ray.available_resources().get("GPU", 0) < 6:
        time.sleep(0.1)


class Holds:
    def here(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()


def test_a_group_waits_until_a_node_has_room_for_a_whole_worker():
    import ray

    kind: Any = ray.remote(num_cpus=0, num_gpus=2, scheduling_strategy="SPREAD")(Holds)
    holders: list[Any] = [kind.remote(), kind.remote()]
    assert len({ray.get(one.here.remote()) for one in holders}) == 2
    size = group_size(resources("num_workers=1", "gpus_per_worker=2"))
    waiting = Waiting(size=size)

    def soon(seen: Callable[[], bool]) -> bool:
        until = time.monotonic() + 60
        while not (found := seen()) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    assert soon(lambda: waiting.line() is not None), "one GPU of each node is free, which is no place for a worker of two"
    assert waiting.said == "waiting for a node with room for a whole worker; what is free is spread over nodes"
    ray.kill(holders[0])
    assert soon(lambda: missing_room(1, size.each, nodes_there()) is None)

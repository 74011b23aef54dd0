"""How many workers fit on a cluster of two nodes of 4 CPUs and 3 (pretended) GPUs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from raytune_llm import load_config
from raytune_llm.config.resources import Cluster
from raytune_llm.errors import ConfigError
from raytune_llm.runs.group_size import check_fits, group_size, wait_until_free
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


def test_a_group_waits_until_a_node_has_room_for_a_whole_worker():
    import ray

    @ray.remote(num_cpus=0, num_gpus=2, scheduling_strategy="SPREAD")
    class Holds:
        def here(self) -> str:
            return ray.get_runtime_context().get_node_id()

    holders: list[Any] = [Holds.remote(), Holds.remote()]
    assert len({ray.get(one.here.remote()) for one in holders}) == 2
    size = group_size(resources("num_workers=1", "gpus_per_worker=2"))
    said: list[str] = []
    noticed = threading.Event()

    def notice(news: Any) -> None:
        said.append(news.text)
        noticed.set()

    waits = threading.Thread(target=wait_until_free, args=(size, notice), daemon=True)
    waits.start()
    assert noticed.wait(60), "one GPU of each node is free, which is no place for a worker of two"
    ray.kill(holders[0])
    waits.join(60)
    assert not waits.is_alive()
    assert said[0] == "waiting for a node with room for a whole worker; what is free is spread over nodes"

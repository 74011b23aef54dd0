"""How large the next group of an elastic run is."""

from __future__ import annotations

import pytest

from raytune_llm import load_config
from raytune_llm.config.resources import worker_counts
from raytune_llm.errors import ConfigError
from raytune_llm.runs.elastic import SETTLED_S, RoomToGrow, largest, largest_ever
from raytune_llm.runs.group_size import missing_room
from raytune_llm.runs.live_nodes import Leaving, LiveNode

GPU = {"CPU": 1.0, "GPU": 1.0}


def node(free: float, total: float = 8.0) -> LiveNode:
    return LiveNode(total={"CPU": 64.0, "GPU": total}, free={"CPU": 64.0, "GPU": free})


def test_sizes_are_those_that_share_a_step_evenly():
    assert worker_counts([4, 16], 64) == [4, 8, 16]
    assert worker_counts([1, 6], 12) == [1, 2, 3, 4, 6]
    assert worker_counts(8, 64) == [8] and worker_counts("auto", 64) == []


def test_the_largest_size_has_a_place_for_each_of_its_workers():
    counts = [4, 8, 16]
    assert largest(counts, [node(8), node(8)], GPU) == 16
    assert largest(counts, [node(8), node(7)], GPU) == 8
    assert largest(counts, [node(3), node(0)], GPU) is None
    assert largest(counts, [node(0), node(8)], GPU, held=8) == 16, "what the group holds already counts"
    assert largest_ever(counts, [node(0), node(3)], GPU) == 16
    assert largest(counts, [LiveNode(total={"CPU": 64.0}, free={"CPU": 64.0})], GPU) is None, "a node without GPUs"
    halves = LiveNode(total={"CPU": 3.0}, free={"CPU": 3.0})
    assert largest([1, 2], [halves, halves], {"CPU": 2.0, "GPU": 0.0}) == 2, "no worker is spread over nodes"
    assert largest([1, 2, 3], [halves, halves], {"CPU": 2.0, "GPU": 0.0}) == 2


def test_workers_wait_for_whole_places():
    pair = [LiveNode(total={"CPU": 4.0, "GPU": 2.0}, free={"CPU": 4.0, "GPU": 2.0})] * 4
    assert missing_room(8, GPU, pair) is None
    spread = "what is free is spread over nodes"
    assert missing_room(2, {"CPU": 1.0, "GPU": 3.0}, pair) == f"waiting for nodes with room for 2 whole workers; {spread}"
    assert missing_room(1, {"CPU": 8.0, "GPU": 0.0}, pair) == f"waiting for a node with room for a whole worker; {spread}"
    assert missing_room(9, GPU, pair) == "waiting for 1 more worker of 1 GPU; the cluster has 8 of 8 GPUs free"


def test_a_group_grows_once_the_room_has_been_there_for_a_while():
    now, nodes = [0.0], [node(0)]
    grows = RoomToGrow(counts=[4, 8, 16], workers=8, each=GPU, look=lambda: nodes, clock=lambda: now[0])

    def later(seconds: float) -> bool:
        now[0] += seconds
        return grows()

    assert not grows()
    nodes = [node(0), node(8)]
    assert not later(3)
    nodes = [node(0)]
    assert not later(3), "it went again"
    nodes = [node(0), node(8)]
    assert not later(3)
    assert not later(0.1)
    assert later(SETTLED_S) and grows.found == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["resources.num_workers=[3,8]"],
            r"must begin and end with numbers of workers .*got \[3, 8\]\. Choose two of 1, 2, 4, 8",
        ),
        (["resources.num_workers=[4,2]"], "fewest < most"),
        (["resources.num_workers=[1,2,3]"], "resources"),
        (
            ["resources.num_workers=[1,2]", "data.streaming=true", "train.max_steps=2", "checkpoint.every_steps=1"],
            "data.streaming",
        ),
    ],
)
def test_ranges_that_can_not_work_are_refused(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config("train", ["data.path=x", "resources=cluster", "train.global_batch_size=8", *words])


def test_a_sweep_s_trials_keep_their_size():
    with pytest.raises(ConfigError, match="one number for a sweep"):
        load_config("tune", ["data.path=x", "resources=cluster", "resources.num_workers=[1,2]"])


def test_a_group_leaves_where_one_of_its_own_nodes_drains():
    at, draining = [0.0], set[str]()
    leaving = Leaving(nodes_of_group=lambda: {"a", "b"}, look=lambda: draining, clock=lambda: at[0])

    def after(seconds: float) -> bool:
        at[0] += seconds
        return leaving()

    assert not after(0)
    draining.add("c")
    assert not after(9), "another job's"
    draining.add("b")
    assert not after(0.1), "it looks now and then"
    assert after(9)

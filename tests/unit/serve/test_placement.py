from __future__ import annotations

from raytune_llm.serve.placement import ReplicaLoad, rank_replicas


def place(requests: int = 0, *resident: str, slots: int = 2, held: set[str] | None = None) -> ReplicaLoad:
    return ReplicaLoad(rows=4, requests=requests, resident=frozenset(resident), slots=slots, held=held)


def test_an_adapter_is_asked_where_it_is_though_others_are_idle():
    assert rank_replicas("a", {"idle": place(), "has it": place(3, "a")}) == ["has it", "idle"]


def test_of_those_that_have_it_the_one_with_fewer_requests():
    assert rank_replicas("a", {"busy": place(3, "a"), "calm": place(1, "a")}) == ["calm", "busy"]


def test_where_its_replica_is_full_a_free_slot_takes_it():
    assert rank_replicas("a", {"full": place(4, "a"), "evicts": place(0, "b", "c"), "free": place(3, "b")})[0] == "free"


def test_where_nothing_is_free_the_least_loaded_takes_it():
    places = {"full": place(6, "a"), "evicts": place(2, "b", "c"), "fuller": place(9, "b")}
    assert rank_replicas("a", places) == ["evicts", "full", "fuller"]


def test_the_base_goes_where_the_fewest_are():
    assert rank_replicas(None, {"busy": place(2, "a"), "idle": place(0, "b", "c")}) == ["idle", "busy"]


def test_a_replica_that_does_not_know_the_adapter_is_asked_last():
    places = {"knows nothing": place(held={"b"}), "knows": place(3, "b", "c", held={"a", "b", "c"})}
    assert rank_replicas("a", places) == ["knows", "knows nothing"]


def test_a_replica_that_said_nothing_yet_is_taken_as_any():
    assert rank_replicas("a", {"full of others": place(2, "b", "c"), "new": place()}) == ["new", "full of others"]

"""How fast a cluster's nodes reach each other: an all-reduce over one process of each. [ray]"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from raytune_llm.errors import ResourceError, last_line
from raytune_llm.runs.node_calls import ANSWER_TIMEOUT_S, at_node

INTERFACES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
"""Backend -> the environment variable that names its network interface."""
SIZES_BYTES = {"cpu": (2**10, 2**20, 2**24), "cuda": (2**10, 2**20, 2**28)}
REPEATS = 3
TIMEOUT = timedelta(seconds=ANSWER_TIMEOUT_S)


def without_free_gpu(ids: Sequence[str]) -> list[str]:
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [node for node in ids if free.get(node, {}).get("GPU", 0) < 1]


def measure_all_reduce(ids: Sequence[str], backend: str) -> dict[int, float]:
    """By actors, which can be ended where they don't answer. (Ray 2.60 aborts a process that cancels a task as it begins.)"""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    kind: Any = ray.remote(num_cpus=0, num_gpus=1 if backend == "nccl" else 0)(AllReduce)
    ranks = [kind.options(scheduling_strategy=at_node(node)).remote(rank, len(ids), backend) for rank, node in enumerate(ids)]
    try:
        meeting = ray.get(ranks[0].listen.remote(), timeout=ANSWER_TIMEOUT_S * 2)
        times = ray.get([one.measure.remote(meeting) for one in ranks], timeout=ANSWER_TIMEOUT_S * 2)
    except RayError as error:
        what = "no answer" if isinstance(error, GetTimeoutError) else last_line(error)
        raise ResourceError(
            f"an all-reduce over one process of each node failed by {backend} ({what})",
            "Open all ports between the nodes, and if they have several networks, start Ray with "
            f"{INTERFACES[backend]} set to the interface that they share.",
        ) from None
    finally:
        for one in ranks:
            ray.kill(one)
    return {num_bytes: max(one[num_bytes] for one in times) for num_bytes in times[0]}


class AllReduce:
    """One process of a group. Its methods are called remotely."""

    def __init__(self, rank: int, world: int, backend: str) -> None:
        import torch.distributed  # noqa: F401  # seconds, in all processes at once

        self._rank, self._world, self._backend = rank, world, backend
        self._store: Any = None

    def listen(self) -> tuple[str, int]:
        """Where the group meets: at a port that this process has opened."""
        import ray
        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return address, self._store.port

    def measure(self, meeting: tuple[str, int]) -> dict[int, float]:
        """Size in bytes -> median seconds of an all-reduce over all processes."""
        import torch
        import torch.distributed as dist

        store = self._store or dist.TCPStore(*meeting, is_master=False, timeout=TIMEOUT)
        dist.init_process_group(self._backend, store=store, rank=self._rank, world_size=self._world, timeout=TIMEOUT)
        device = "cuda" if self._backend == "nccl" else "cpu"
        times: dict[int, float] = {}
        for num_bytes in SIZES_BYTES[device]:
            numbers = torch.zeros(num_bytes // 4, device=device)
            took = []
            for _ in range(1 + REPEATS):
                began = time.perf_counter()
                dist.all_reduce(numbers)
                numbers[0].item()  # waits for the device to finish
                took.append(time.perf_counter() - began)
            times[num_bytes] = statistics.median(took[1:])
        return times

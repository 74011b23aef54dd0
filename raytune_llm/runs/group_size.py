"""How many workers a run has, the CPUs and GPUs of each, and whether the cluster has room for them. [ray]

All functions need a connected cluster, except for a run in this process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raytune_llm.config.resources import Cluster, Local, on_cluster, uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError
from raytune_llm.runs.faults import waiting_line
from raytune_llm.runs.live_nodes import LOOK_EVERY_S, LiveNode, nodes_there, summed
from raytune_llm.runs.nodes import workers_that_fit

log = logging.getLogger(__name__)
TOKENIZING_CPUS = 1
"""Minimum number of CPUs that are reserved for data.streaming, which tokenizes while the workers train."""
NOTICE_AFTER_S = 2.0
NOTICE_INTERVAL_S = 30.0
ROOM_AFTER_S = 15.0
"""An actor that has not started after this time may lack room."""


@dataclass(frozen=True, kw_only=True)
class GroupSize:
    """A group of equal workers."""

    workers: int
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker."""

    @property
    def each(self) -> Mapping[str, float]:
        """A worker's resources, by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus}


def group_size(resources: Local | Cluster, *, reserved_cpus: int = 0) -> GroupSize:
    """The group that `resources` asks for; for a range, the smallest. reserved_cpus: CPUs that `auto` leaves to other tasks."""
    import ray

    total = ray.cluster_resources()
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if total.get("GPU", 0) else 0.0
    workers = resources.num_workers
    cpus = resources.cpus_per_worker
    if workers == "auto":
        each = {"GPU": gpus, "CPU": 1.0 if cpus == "auto" else cpus}
        workers = max(1, sum(workers_that_fit(node, each) for node in _nodes())) if gpus else 1
    if isinstance(workers, list):
        workers = workers[0]
    if cpus == "auto":
        cpus = 1.0
        if not on_cluster(resources) and not gpus:
            each = (total["CPU"] - reserved_cpus) / workers
            cpus = each // 1 or (each if reserved_cpus and each else 1.0)
    return GroupSize(workers=workers, cpus=float(cpus), gpus=float(gpus))


def most_workers(resources: Local | Cluster, size: GroupSize) -> int:
    """The number of workers; for a range, the largest."""
    return resources.num_workers[-1] if isinstance(resources.num_workers, list) else size.workers


def reserved_cpus(run: TrainRun) -> int:
    """CPUs that the workers leave to the run's other tasks."""
    return TOKENIZING_CPUS if run.data.streaming else 0


def spare_cpus(run: TrainRun) -> int | None:
    """CPUs that are free for tokenizing while the workers train. None: the run trains in this process."""
    if not uses_ray(run.resources):
        return None
    import ray

    size = group_size(run.resources, reserved_cpus=TOKENIZING_CPUS)
    return max(TOKENIZING_CPUS, int(ray.cluster_resources()["CPU"] - size.workers * size.cpus))


def check_fits(size: GroupSize, *, reserved_cpus: int = 0) -> None:
    """Raises ConfigError for a group that even an idle cluster can't hold; Ray would wait for it forever."""
    nodes = _nodes()
    total = summed(nodes)
    for kind, each, reserved in (("CPU", size.cpus, reserved_cpus), ("GPU", size.gpus, 0)):
        if each * size.workers > total.get(kind, 0.0) - reserved:
            raise ConfigError(
                "resources.num_workers",
                f"times resources.{kind.lower()}s_per_worker={each:g} must be at most "
                f"the {total.get(kind, 0.0):g} {kind}s that there are"
                + (f", less {reserved} for data.streaming" if reserved else ""),
                got=size.workers,
                fix="Lower one of them.",
            )
    found = sum(workers_that_fit(node, size.each) for node in nodes)
    if found < size.workers:
        worker = " and ".join(f"{amount:g} {kind}{'' if amount == 1 else 's'}" for kind, amount in size.each.items() if amount)
        raise ConfigError(
            "resources.num_workers",
            f"must be at most {found}: so many workers of {worker} fit on the cluster's nodes, and none is spread over two",
            got=size.workers,
            fix="Lower it, or what each worker takes (resources.gpus_per_worker, resources.cpus_per_worker).",
        )


@dataclass(kw_only=True)
class Waiting:
    """Tells what a group without resources waits for, which Ray does not say. It must be called often."""

    size: GroupSize
    clock: Callable[[], float] = time.monotonic
    said: str = field(default="", init=False)
    """The last line."""
    _began: float | None = field(default=None, init=False)
    _said_at: float = field(default=0.0, init=False)
    _looked: float = field(default=float("-inf"), init=False)

    def line(self) -> str | None:
        """A line for the user. None if the wait is short so far, if the group has its resources, or if it was just reported."""
        now = self.clock()
        self._began = now if self._began is None else self._began
        if now - self._began < NOTICE_AFTER_S or now - self._looked < LOOK_EVERY_S:
            return None
        self._looked = now
        line = missing_room(self.size.workers, self.size.each, nodes_there())
        if line is None or (line == self.said and now - self._said_at < NOTICE_INTERVAL_S):
            return None
        self.said, self._said_at = line, now
        return line


def missing_room(workers: int, each: Mapping[str, float], nodes: Sequence[LiveNode]) -> str | None:
    """What the workers wait for, as a line of text; None if each fits on a node."""
    if sum(workers_that_fit(node.free, each) for node in nodes) >= workers:
        return None
    line = waiting_line(workers, each, summed(node.free for node in nodes), summed(node.total for node in nodes))
    whole = "a node with room for a whole worker" if workers == 1 else f"nodes with room for {workers} whole workers"
    return line or f"waiting for {whole}; what is free is spread over nodes"


def warn_without_room(workers: int, each: Mapping[str, float]) -> None:
    """Log what workers wait for; nothing where each has a place."""
    if (line := missing_room(workers, each, nodes_there())) is not None:
        log.warning(line)


def _nodes() -> list[Mapping[str, float]]:
    """The total resources of each node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]

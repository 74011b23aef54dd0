"""Checks a cluster's nodes before a run: same versions, shared storage, and a network between them. [ray]

The driver queries all nodes at once, which takes seconds, and shows the results as a table. A run that can't work is rejected
before anything is prepared or written.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raytune_llm.byte_size import in_units
from raytune_llm.config.resources import Cluster
from raytune_llm.errors import ConfigError, ResourceError, RunLost, UserError, first_line, last_line
from raytune_llm.object_store import check_writable, is_address

PACKAGES = ("raytune-llm", "ray", "torch", "transformers", "peft", "numpy", "pyarrow")
"""Packages whose versions affect a run's numbers, or whether its processes can communicate."""
SHM = Path("/dev/shm")
MIN_SHM_BYTES = 2**30
"""With less, NCCL and Ray's object store fail with unrelated errors. The default of containers is 64 MiB."""
MAX_SKEW_S = 5.0
"""Maximum difference of clocks; times of files on shared storage and in logs are compared between nodes."""
VISIBLE_WITHIN_S = 10.0
"""Network file systems show another node's new file with a delay."""
ALL_REDUCE_BYTES = {"cpu": (2**10, 2**20, 2**24), "cuda": (2**10, 2**20, 2**28)}
ALL_REDUCE_REPEATS = 3
ANSWER_TIMEOUT_S = 60.0
ANSWER_TIMEOUT = timedelta(seconds=ANSWER_TIMEOUT_S)
READ_WITHIN_S = 10.0
READ_BYTES = 2**18
"""Ray sends smaller objects along with a call; larger ones are fetched from who has them."""
INTERFACES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


@dataclass(frozen=True, kw_only=True)
class Node:
    """The properties of a node."""

    address: str
    python: str
    versions: Mapping[str, str]
    gpus: float
    shm_bytes: int
    interface: str
    """Name of the network interface with the node's address."""
    interface_variables: Mapping[str, str]
    """Environment variables that choose another interface for collectives, with their values."""
    name_is_loopback: bool
    """The host name resolves to a loopback address, which gloo would give the other nodes unless an interface is set."""
    skew_s: float = 0.0
    """Seconds that its clock is ahead of the driver's."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a run, and the time of an all-reduce over one process per node."""

    nodes: Sequence[Node]
    """The nodes that can take workers."""
    backend: str
    driver: Node | None = None
    """The driver's node if it can't take workers, such as a head without CPUs; else None."""
    all_reduce_nodes: int = 0
    """Number of nodes in the all-reduce; 0: it was not measured."""
    all_reduce_s: Mapping[int, float] = field(default_factory=dict)
    """Size in bytes -> seconds."""

    def table(self) -> list[str]:
        rows = [("node", "python", "torch", "ray", "GPUs", "/dev/shm", "clock", "interface")]
        driver = [] if self.driver is None else [replace(self.driver, address=f"{self.driver.address} (driver)")]
        for node in (*self.nodes, *driver):
            interface = next((f"{value} ({name})" for name, value in node.interface_variables.items()), node.interface)
            rows.append(
                (
                    node.address, node.python, node.versions["torch"], node.versions["ray"], f"{node.gpus:g}",
                    in_units(node.shm_bytes), f"{node.skew_s:+.2f} s", interface,
                )
            )  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def rates(self) -> list[str]:
        """Time and bus bandwidth of the all-reduce, one line per size."""
        lines = []
        for num_bytes, seconds in self.all_reduce_s.items():
            rate = 2 * (self.all_reduce_nodes - 1) / self.all_reduce_nodes * num_bytes / seconds / 2**30
            size = f"{num_bytes / 2**20:g} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:g} KiB"
            lines.append(f"all-reduce of {size} by {self.backend}: {seconds * 1e3:.2f} ms, {rate:.2f} GiB/s")
        return lines


def check_nodes(
    resources: Cluster,
    folders: Mapping[str, str],
    *,
    workers: int,
    each: Mapping[str, float],
    report: Callable[[str], None],
) -> Nodes | None:
    """Check the nodes of the connected cluster. Raises ResourceError or ConfigError if the run can't work on them.

    folders: setting -> folder that all nodes must share. workers, each: number of workers, and CPUs and GPUs of one. report:
    called with lines of text for the user. The all-reduce is measured over one process on each node that can hold a worker,
    unless one node can hold all workers. Returns None if the driver's node is the only one that can take workers, or with
    resources.preflight=off.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    alive.sort(key=lambda node: ipaddress.ip_address(node["NodeManagerAddress"]))
    ids = [node["NodeID"] for node in alive]
    here = ray.get_runtime_context().get_node_id()
    if not set(ids) - {here} or resources.preflight == "off":
        return None
    backend = "nccl" if each.get("GPU") else "gloo"
    found = Nodes(nodes=_ask(ids), backend=backend, driver=None if here in ids else Node(**describe_node()))
    for line in found.table():
        report(line)
    check_versions(found.nodes, found.driver)
    check_reachable(found)
    for node in found.nodes:
        if node.shm_bytes < MIN_SHM_BYTES:
            report(
                f"warning: {node.address} has {in_units(node.shm_bytes)} of /dev/shm: mount a memory volume (docker: --shm-size)"
            )
        if abs(node.skew_s) > MAX_SKEW_S:
            report(f"warning: the clock of {node.address} is {node.skew_s:+.1f} s off the driver's: run an NTP client on both")
    _check_reads_from_here(ids, [node.address for node in found.nodes])
    for setting, folder in folders.items():
        if is_address(folder):
            _check_reached(setting, folder, ids, [node.address for node in found.nodes])
        else:
            _check_shared(setting, Path(folder), ids, [node.address for node in found.nodes])
    room = {node["NodeID"]: workers_that_fit(node["Resources"], each) for node in alive}
    if resources.preflight == "full" and max(room.values()) < workers:
        those = [node for node in ids if room[node]]
        if len(those) > 1 and each.get("GPU") and (busy := _without_free_gpu(those)):
            report(f"all-reduce: not measured, since all GPUs of {len(busy)} of {len(those)} nodes are in use")
        elif len(those) > 1:
            found = replace(found, all_reduce_nodes=len(those), all_reduce_s=_measure_all_reduce(those, backend))
        for line in found.rates():
            report(line)
    return found


def workers_that_fit(there: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Number of workers with resources `each` that fit into the resources `there`."""
    return min(int(there.get(kind, 0.0) / amount + 1e-6) for kind, amount in each.items() if amount)


def check_versions(nodes: Sequence[Node], driver: Node | None = None) -> None:
    """Raises ResourceError if versions differ between nodes. The driver's build may be for another device (torch 2.9.0+cpu)."""
    first = nodes[0]

    def differ(other: Node, name: str, mine: str, its: str) -> ResourceError:
        return ResourceError(
            f"the cluster's nodes have {name} {mine} on {first.address} and {its} on {other.address}",
            "Give all nodes the same image or environment, or set submit.requirements=pinned.",
        )

    for name in ("python", *PACKAGES):
        mine = _version_on(first, name)
        for other in nodes[1:]:
            if (its := _version_on(other, name)) != mine:
                raise differ(other, name, mine, its)
        if driver is not None and (its := _version_on(driver, name)).partition("+")[0] != mine.partition("+")[0]:
            raise differ(replace(driver, address=f"{driver.address} (the driver)"), name, mine, its)


def _version_on(node: Node, name: str) -> str:
    return node.python if name == "python" else node.versions[name]


def check_reachable(found: Nodes) -> None:
    """Raises ResourceError if gloo would give other nodes a loopback address. It may if all nodes have one address, since they
    are one machine."""
    variable = INTERFACES[found.backend]
    if found.backend != "gloo" or len({node.address for node in found.nodes}) < 2:
        return
    for node in found.nodes:
        if node.name_is_loopback and variable not in node.interface_variables:
            raise ResourceError(
                f"the host name of {node.address} resolves to a loopback address, which no other node can reach",
                f"Start Ray there with {variable}={node.interface}, or correct its /etc/hosts.",
            )


def _ask(ids: Sequence[str]) -> list[Node]:

    asked = [_on(node, describe_node).remote() for node in ids]
    nodes = _answers(asked, "report their properties")
    skews = []
    for watch in [_on(node, clock) for node in ids]:  # their processes have just been started, so they answer without delay
        before = time.time()
        [there] = _answers([watch.remote()], "tell the time")
        skews.append(there - (before + time.time()) / 2)
    return [Node(**{**values, "skew_s": skew}) for values, skew in zip(nodes, skews, strict=True)]


def describe_node() -> dict[str, Any]:
    """The fields of `Node` for this machine, without skew_s."""
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    interfaces = [name for name, found in psutil.net_if_addrs().items() if any(one.address == address for one in found)]
    shm = os.statvfs(SHM) if SHM.is_dir() else None
    return {
        "address": address,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "gpus": next((one["Resources"].get("GPU", 0) for one in ray.nodes() if one["NodeManagerAddress"] == address), 0),
        "shm_bytes": 0 if shm is None else shm.f_blocks * shm.f_frsize,
        "interface": interfaces[0] if interfaces else "none",
        "interface_variables": {name: os.environ[name] for name in INTERFACES.values() if name in os.environ},
        "name_is_loopback": _is_loopback(socket.gethostname()),
    }


def clock() -> float:
    return time.time()


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, family=socket.AF_INET)
    except OSError:
        return True  # unknown: gloo falls back to loopback
    return all(ipaddress.ip_address(one[4][0]).is_loopback for one in found)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _check_reads_from_here(ids: Sequence[str], addresses: Sequence[str]) -> None:
    """Raises ResourceError unless all nodes can fetch what this process holds. A task waits without limit for an object of a
    process that it can't reach."""
    import ray

    held = ray.put(bytes(READ_BYTES))
    arrived = _answers([_on(node, fetches).remote([held]) for node in ids], "read an object of the driver's")
    if far := [address for address, here in zip(addresses, arrived, strict=True) if not here]:
        raise ResourceError(
            f"{', '.join(far)} can't fetch what this process holds, at {ray.util.get_node_ip_address()}",
            "Open all ports between that address and the nodes, or start the run on the head, as `submit` does.",
        )


def fetches(held: Sequence[Any]) -> bool:
    """Whether the object arrives. held: its reference, in a list, since Ray would wait for an argument itself."""
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        return len(ray.get(held[0], timeout=READ_WITHIN_S)) == READ_BYTES
    except GetTimeoutError:
        return False


def _check_shared(setting: str, folder: Path, ids: Sequence[str], addresses: Sequence[str]) -> None:
    """Raises ConfigError unless a file that the first node writes is visible on all nodes."""
    name = f".seen-by-all-{uuid.uuid4().hex}"
    (failure,) = _answers([_on(ids[0], write_marker).remote(folder, name)], f"write to {folder}")
    if failure:
        raise ConfigError(setting, f"must be a folder that {addresses[0]} can write ({failure})", got=str(folder))
    try:
        seen = [*_answers([_on(node, sees).remote(folder / name) for node in ids[1:]], f"read {folder}"), sees(folder / name)]
    finally:
        _answers([_on(ids[0], remove_marker).remote(folder, name)], f"clean {folder}")
    blind = [address for address, there in zip([*addresses[1:], "the driver"], seen, strict=True) if not there]
    if blind:
        raise ConfigError(
            setting,
            f"must be on storage that all nodes share: {', '.join(blind)} can't see what {addresses[0]} writes there",
            got=str(folder),
            fix="Mount the same network file system on all nodes, and name a folder in it.",
        )


def _check_reached(setting: str, address: str, ids: Sequence[str], addresses: Sequence[str]) -> None:
    """Raises ConfigError unless all nodes can write to the object store: each needs its package and its credentials."""
    refusals = _answers([_on(node, refusal).remote(address, setting) for node in ids], f"write to {address}")
    for node, said in zip(addresses, refusals, strict=True):
        if said:
            raise ConfigError(setting, f"must be usable from all nodes, and {node} says: {said}", got=address)


def refusal(address: str, setting: str) -> str:
    """The reason why this node can't write to the address; empty if it can."""
    try:
        check_writable(address, setting)
    except UserError as error:
        return str(error)
    return ""


def write_marker(folder: Path, name: str) -> str:
    """Write a marker file. Returns the reason if that fails, else an empty text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def sees(path: Path) -> bool:
    until = time.monotonic() + VISIBLE_WITHIN_S
    while time.monotonic() < until:
        try:
            os.listdir(path.parent)  # so that a network file system refreshes its cache
            if path.read_text() == path.name:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def remove_marker(folder: Path, name: str) -> None:
    """Delete the marker, and then the folder if it is empty."""
    (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _without_free_gpu(ids: Sequence[str]) -> list[str]:
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [node for node in ids if free.get(node, {}).get("GPU", 0) < 1]


def _measure_all_reduce(ids: Sequence[str], backend: str) -> dict[int, float]:
    """By actors, which can be ended where they don't answer. (Ray 2.60 aborts a process that cancels a task as it begins.)"""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    kind: Any = ray.remote(num_cpus=0, num_gpus=1 if backend == "nccl" else 0)(AllReduce)
    ranks = [kind.options(scheduling_strategy=_at(node)).remote(rank, len(ids), backend) for rank, node in enumerate(ids)]
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
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=ANSWER_TIMEOUT)
        return address, self._store.port

    def measure(self, meeting: tuple[str, int]) -> dict[int, float]:
        """Size in bytes -> median seconds of an all-reduce over all processes."""
        import torch
        import torch.distributed as dist

        store = self._store or dist.TCPStore(*meeting, is_master=False, timeout=ANSWER_TIMEOUT)
        dist.init_process_group(self._backend, store=store, rank=self._rank, world_size=self._world, timeout=ANSWER_TIMEOUT)
        device = "cuda" if self._backend == "nccl" else "cpu"
        times: dict[int, float] = {}
        for num_bytes in ALL_REDUCE_BYTES[device]:
            numbers = torch.zeros(num_bytes // 4, device=device)
            took = []
            for _ in range(1 + ALL_REDUCE_REPEATS):
                began = time.perf_counter()
                dist.all_reduce(numbers)
                numbers[0].item()  # waits for the device to finish
                took.append(time.perf_counter() - began)
            times[num_bytes] = statistics.median(took[1:])
        return times


def _on(node: str, function: Callable[..., Any]) -> Any:
    import ray

    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=_at(node))


def _at(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def _answers(asked: Sequence[Any], what: str) -> list[Any]:
    """The results of remote calls. Raises ResourceError if a call fails or takes too long, and RunLost if a node is lost. what:
    the task, such as "report their properties"."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        return ray.get(list(asked), timeout=ANSWER_TIMEOUT_S)
    except GetTimeoutError:
        raise ResourceError(
            f"nodes of the cluster did not {what} within {ANSWER_TIMEOUT_S:g} s", "See `ray status` for nodes that are lost."
        ) from None
    except RayTaskError as error:
        raise ResourceError(
            f"a node of the cluster can't {what} ({last_line(error)})",
            "Give all nodes the same image or environment as the driver.",
        ) from None
    except RayError as error:
        raise RunLost(
            f"a node of the cluster was lost before it could {what} ({first_line(error)})",
            "See `ray status`; the same command tries again.",
        ) from None

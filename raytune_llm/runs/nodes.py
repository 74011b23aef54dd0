"""Checks a cluster's nodes before a run: same versions, shared storage, and a network between them. [ray]

The driver queries all nodes at once, which takes seconds, and shows the results as a table. A run that can't work is rejected
before anything is prepared or written.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raytune_llm.byte_size import in_units
from raytune_llm.config.resources import Cluster
from raytune_llm.errors import ResourceError
from raytune_llm.object_store import is_address
from raytune_llm.runs.all_reduce import INTERFACES, measure_all_reduce, without_free_gpu
from raytune_llm.runs.node_calls import answers, on_node
from raytune_llm.runs.shared_folders import check_reached, check_shared

PACKAGES = ("raytune-llm", "ray", "torch", "transformers", "peft", "numpy", "pyarrow")
"""Packages whose versions affect a run's numbers, or whether its processes can communicate."""
SHM = Path("/dev/shm")
MIN_SHM_BYTES = 2**30
"""With less, NCCL and Ray's object store fail with unrelated errors. The default of containers is 64 MiB."""
MAX_SKEW_S = 5.0
"""Maximum difference of clocks; times of files on shared storage and in logs are compared between nodes."""
READ_WITHIN_S = 10.0
READ_BYTES = 2**18
"""Ray sends smaller objects along with a call; larger ones are fetched from who has them."""


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
            check_reached(setting, folder, ids, [node.address for node in found.nodes])
        else:
            check_shared(setting, Path(folder), ids, [node.address for node in found.nodes])
    room = {node["NodeID"]: workers_that_fit(node["Resources"], each) for node in alive}
    if resources.preflight == "full" and max(room.values()) < workers:
        those = [node for node in ids if room[node]]
        if len(those) > 1 and each.get("GPU") and (busy := without_free_gpu(those)):
            report(f"all-reduce: not measured, since all GPUs of {len(busy)} of {len(those)} nodes are in use")
        elif len(those) > 1:
            found = replace(found, all_reduce_nodes=len(those), all_reduce_s=measure_all_reduce(those, backend))
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
    asked = [on_node(node, describe_node).remote() for node in ids]
    nodes = answers(asked, "report their properties")
    skews = []
    for watch in [on_node(node, clock) for node in ids]:  # their processes have just been started, so they answer without delay
        before = time.time()
        [there] = answers([watch.remote()], "tell the time")
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
    arrived = answers([on_node(node, fetches).remote([held]) for node in ids], "read an object of the driver's")
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

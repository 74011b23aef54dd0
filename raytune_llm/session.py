"""Connects this process to Ray: starts a cluster on this machine or joins one."""

from __future__ import annotations

import logging
import os
import socket

from raytune_llm import interrupts
from raytune_llm.config.resources import Cluster, Local, on_cluster
from raytune_llm.errors import ConfigError, ResourceError, first_line

_QUICK = {
    # How often Ray Train looks for dead workers and their last reports (Ray's default is 2 s).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # The watcher is a process of its own and delays a run's end by seconds. The driver looks for draining nodes
    # (runs/live_nodes.py).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Workers keep the driver's working directory, so that relative paths mean the same everywhere.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Records reach the driver through a channel of ours (runs/channel.py); workers' prints would show twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Workers may wait long for free resources or on a busy machine; the driver reports what it waits for. Ray gives up after 60
    # s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # How long a group waits for a lost worker when it is destroyed (Ray's default is 30 s).
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}

ANSWERS_WITHIN_S = 5.0
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
"""The client's connection preface and an empty SETTINGS frame (RFC 9113, section 3.4)."""
HTTP2_SETTINGS = b"\4"
"""The fourth byte of a SETTINGS frame: its type."""


def connect(resources: Local | Cluster) -> None:
    """Start a cluster on this machine (local), or join the one at the address (cluster). A connection that exists is kept, except
    that a cluster which this process started for a local run is shut down when a run asks for `resources=cluster`."""
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        if not (on_cluster(resources) and _is_own()):
            return
        ray.shutdown()
    for name, value in _QUICK.items():
        os.environ.setdefault(name, value)
    if not on_cluster(resources):
        # A cluster that only this process uses needs no token.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            with interrupts.handler_kept():
                ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises a bare Exception if it starts too slowly
            raise ResourceError(
                f"Ray did not start on this machine ({first_line(error)})",
                "The machine is busy, or lacks memory or space in /tmp: try again, or set resources=inline.",
            ) from error
        _silence_daemon_logs()
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise ConfigError(
            "resources.address",
            "must be given if RAY_ADDRESS is not set",
            got="null",
            fix="For example, resources.address=auto on a node of the cluster, or resources=local.",
        )
    _check_head_listens(address)
    try:
        _join(address)
        if (mine := _other_node_of_this_machine()) is not None:
            ray.shutdown()
            _join(address, node=mine)
    except ValueError as error:
        rule = f"must be an address that Ray can read ({first_line(error)})"
        raise ConfigError("resources.address", rule, got=address, fix="For example, 10.0.0.1:6379, or auto.") from error
    except (RayError, RuntimeError, TimeoutError, OSError, AssertionError) as error:
        raise _no_cluster(address, first_line(error)) from error
    _silence_daemon_logs()


def _join(address: str, node: str | None = None) -> None:
    """node: the address of the node of this machine, which Ray looks for by itself among the machine's processes."""
    import ray

    with interrupts.handler_kept():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, _node_ip_address=node)


def _other_node_of_this_machine() -> str | None:
    """The address of the node that this process should have joined. None: it has joined that one.

    Ray takes the head wherever it sees the head's process, also where that is in another network: in containers that share
    process ids, and in network namespaces. The process then gives the nodes an address at which it can't be reached.
    """
    import psutil
    import ray

    mine = {found.address for interface in psutil.net_if_addrs().values() for found in interface}
    if ray.util.get_node_ip_address() in mine:
        return None
    return next(
        (node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] in mine), None
    )


def _is_own() -> bool:
    """Whether this process started the cluster, which then ends with it."""
    import ray._private.worker

    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def _silence_daemon_logs() -> None:
    """Keep the daemons' long messages about lost workers off the screen. Ray prints them even with log_to_driver=False; they are
    in its log files too."""
    import ray._private.worker

    ray._private.worker._worker_logs_enabled = False


def _check_head_listens(address: str) -> None:
    """Raises ResourceError within seconds if no Ray head listens at the address; Ray itself would try for minutes.

    A head speaks gRPC, so it answers an HTTP/2 preface with its SETTINGS frame. The dashboard (port 8265) does not.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWERS_WITHIN_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9)
    except OSError as error:
        raise _no_cluster(address, error) from None
    if answer[3:4] != HTTP2_SETTINGS:
        raise _no_cluster(address, "what listens there is no head of Ray, whose port is 6379 unless --port says another")


def _no_cluster(address: str, error: object) -> ResourceError:
    return ResourceError(f"no Ray cluster answers at {address} ({error})", "Start one with `ray start --head`.")

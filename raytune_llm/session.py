"""The Ray cluster of this process: started on this machine, or joined. One of the few files that import ray."""

from __future__ import annotations

import logging
import os
import socket

from raytune_llm import interrupts
from raytune_llm.config.resources import Cluster, Local, on_cluster
from raytune_llm.errors import ConfigError, ResourceError, first_line

_QUICK = {
    # A worker's death is seen, and its last report registered, after this long (Ray's default is 2 s).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Another process, which costs seconds at a run's end. The driver itself looks for nodes that drain (runs/live_nodes.py).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Workers keep the driver's working directory, so that relative paths mean the same everywhere.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Records reach the driver through its own channel; workers' prints would show twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Workers that wait for a place, or for a busy machine, are not given up after a minute; who waits says so.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # A group whose worker is gone does not wait half a minute for its farewell.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}

ANSWERS_WITHIN_S = 5.0
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
"""The client's preface, and a frame of no settings (RFC 9113, 3.4)."""
HTTP2_SETTINGS = b"\4"
"""Type of a frame, its fourth byte."""


def connect(resources: Local | Cluster) -> None:
    """Start a cluster on this machine (local) or join the one at the address (cluster). Does nothing if already connected, unless
    to the cluster that an earlier local run of this process started for itself, and another one is asked for."""
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        if not (on_cluster(resources) and _is_own()):
            return
        ray.shutdown()
    for name, value in _QUICK.items():
        os.environ.setdefault(name, value)
    if not on_cluster(resources):
        # A cluster that only this process uses needs no token; the shared ones keep theirs.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            with interrupts.handler_kept():
                ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # a slow start is a plain one
            raise ResourceError(
                f"Ray did not start on this machine ({first_line(error)})",
                "The machine is busy, or lacks memory or space in /tmp: try again, or set resources=inline.",
            ) from error
        _keep_paragraphs_off_the_screen()
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise ConfigError(
            "resources.address",
            "must be given if RAY_ADDRESS is not set",
            got="null",
            fix="For example, resources.address=auto on a node of the cluster, or resources=local.",
        )
    _answers(address)
    try:
        with interrupts.handler_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ValueError as error:
        rule = f"must be an address that Ray can read ({first_line(error)})"
        raise ConfigError("resources.address", rule, got=address, fix="For example, 10.0.0.1:6379, or auto.") from error
    except (RayError, RuntimeError, TimeoutError, OSError, AssertionError) as error:
        raise _nobody(address, first_line(error)) from error
    _keep_paragraphs_off_the_screen()


def _is_own() -> bool:
    """The cluster ends with this process, which started it."""
    import ray._private.worker

    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def _keep_paragraphs_off_the_screen() -> None:
    """Ray prints what its daemons say of a lost worker, in paragraphs, whatever log_to_driver says; its logs have it, too."""
    import ray._private.worker

    ray._private.worker._worker_logs_enabled = False


def _answers(address: str) -> None:
    """Fail within seconds if no head of Ray listens; Ray would try for minutes.

    A head speaks HTTP/2 (gRPC): it answers the greeting with its settings. Its dashboard, at port 8265, does not.
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
        raise _nobody(address, error) from None
    if answer[3:4] != HTTP2_SETTINGS:
        raise _nobody(address, "what listens there is no head of Ray, whose port is 6379 unless --port says another")


def _nobody(address: str, error: object) -> ResourceError:
    return ResourceError(f"no Ray cluster answers at {address} ({error})", "Start one with `ray start --head`.")

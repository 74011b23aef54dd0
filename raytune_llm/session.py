"""The Ray cluster of this process: started on this machine, or joined. One of the few files that import ray."""

from __future__ import annotations

import logging
import os
import socket

from raytune_llm.config.resources import Cluster, Local
from raytune_llm.errors import ConfigError, ResourceError

_QUICK = {
    # A worker's death is seen, and its last report registered, after this long (Ray's default is 2 s).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Polls for preempted nodes of a cloud; costs about 4 s at a run's end.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Workers keep the driver's working directory, so that relative paths mean the same everywhere.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Records reach the driver through its own channel; workers' prints would show twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def connect(resources: Local | Cluster) -> None:
    """Start a cluster on this machine (local) or join the one at the address (cluster). Does nothing where that was done."""
    import ray

    if ray.is_initialized():
        return
    for name, value in _QUICK.items():
        os.environ.setdefault(name, value)
    if isinstance(resources, Local):
        # A cluster that only this process uses needs no token; the shared ones keep theirs.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise ConfigError(
            "resources.address",
            "must be given where RAY_ADDRESS is not set",
            got="null",
            fix="Say, resources.address=auto on a node of the cluster, or resources=local.",
        )
    _answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise _nobody(address, error) from None


def _answers(address: str) -> None:
    """Ray would try for a minute where nobody listens."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise _nobody(address, error) from None


def _nobody(address: str, error: Exception) -> ResourceError:
    return ResourceError(f"no Ray cluster answers at {address} ({error})", "Start one with `ray start --head`.")

"""`serve` with resources=local or cluster: the application is deployed on Ray Serve, watched over, and drained at the end.

One of the few files that import ray.
"""

from __future__ import annotations

import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, LoggingConfig

from raytune_llm import interrupts, session
from raytune_llm.config.load import to_yaml_text
from raytune_llm.config.resources import Cluster, Local
from raytune_llm.config.run import ADMIN_KEY, API_KEY, ServeRun
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.serve.app import APP, ENGINE, INGRESS_CPUS, TRANSPORT, application, http_options, written
from raytune_llm.serve.engines import base_name, check_servable
from raytune_llm.serve.port import bound
from raytune_llm.serve.replica import REFUSED, BuildEngine

logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it says here is said by us
POLL_S = 0.2
WATCH_S = 2.0
SPARE_S = 15.0
"""Beside drain_s: for Serve to end what has drained."""
Told = Callable[[str], None]


def write(run: ServeRun, *, told: Told) -> None:
    """`serve.write`: the config of a RayService or of `serve deploy`."""
    assert run.serve.write is not None and run.resources.name != "inline"
    path = Path(run.serve.write)
    cpus, gpus = run.resources.cpus_per_worker, run.resources.gpus_per_worker
    # Where this is written is not where it runs.
    sized = _sized(run, cpus=1.0 if cpus == "auto" else cpus, gpus=1.0 if gpus == "auto" else gpus)
    name = base_name(run.model, run.serve)
    head = f"# Ray Serve's config of a server of {name}, for `serve deploy` or a RayService's serveConfigV2.\n"
    try:
        path.write_text(head + to_yaml_text(written(sized)))
    except OSError as error:
        raise ConfigError("serve.write", f"must be a file that can be written ({error.strerror})", got=str(path)) from None
    told(f"wrote {path}")
    if gpus == "auto":
        told("each replica takes one GPU: set resources.gpus_per_worker=0 for nodes without")


def serve_on_ray(run: ServeRun, *, told: Told, build: BuildEngine | None = None) -> None:
    """Until it is interrupted, by Ctrl-C or SIGTERM, which it raises (KeyboardInterrupt, Terminated) when it has ended in order.
    build: another engine than the settings name."""
    resources = run.resources
    assert resources.name != "inline"
    port = _port(run)
    if build is None:
        check_servable(run.model, run.quantization, run.engine, run.serve)
    joined, is_ours = ray.is_initialized(), False
    with interrupts.heard_once() as later:
        try:
            told("starting Ray" if isinstance(resources, Local) else "joining the cluster")
            if isinstance(resources, Local):
                for name, value in TRANSPORT.items():
                    os.environ.setdefault(name, value)
            session.connect(resources)
            _start(run, port)
            is_ours = True
            update(run, build=build)
            _wait_until_ready(run, port, told)
            _watch_over(told)
        except KeyboardInterrupt:
            told("draining")
            raise
        finally:
            if is_ours:
                _stop(run, hurried=lambda: later.number > 0)
            if not joined:
                ray.shutdown()
            if later.first is not None:
                told("stopped")


# Before anything is deployed ------------------------------------------------------------------------------------------------


def _port(run: ServeRun) -> int:
    """A free one where it is 0. On a cluster, its nodes' is not for this machine to try."""
    if isinstance(run.resources, Cluster):
        if run.serve.port == 0:
            fix = "For example, serve.port=8000."
            raise ConfigError("serve.port", "must be given with resources=cluster: every node uses the same port", got=0, fix=fix)
        return run.serve.port
    with closing(bound(run.serve.host, run.serve.port)) as listening:
        return listening.getsockname()[1]


def _placed(run: ServeRun) -> ServeRun:
    """With numbers for CPUs and GPUs of a replica, which are there."""
    resources = run.resources
    assert resources.name != "inline"
    there, fewest = ray.cluster_resources(), run.serve.fewest
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if there.get("GPU", 0) else 0.0
    cpus = resources.cpus_per_worker
    if cpus == "auto":
        spare = there.get("CPU", 0.0) - 2 * INGRESS_CPUS
        cpus = round(spare / run.serve.most, 2) if isinstance(resources, Local) and not gpus else 1.0
    for kind, each, spare in (("CPU", cpus, INGRESS_CPUS), ("GPU", gpus, 0.0)):
        # A cluster may grow; this machine doesn't.
        if isinstance(resources, Local) and each * fewest > there.get(kind, 0.0) - spare:
            raise ResourceError(
                f"{fewest} replicas with {each:g} {kind}s each don't fit this machine's {there.get(kind, 0.0):g}",
                f"Lower serve.replicas or resources.{kind.lower()}s_per_worker.",
            )
    return _sized(run, cpus=float(cpus), gpus=float(gpus))


def _sized(run: ServeRun, *, cpus: float, gpus: float) -> ServeRun:
    assert run.resources.name != "inline"
    return replace(run, resources=replace(run.resources, cpus_per_worker=cpus, gpus_per_worker=gpus))


def _with_keys(run: ServeRun) -> ServeRun:
    """The environment's keys are those of this process, not of the cluster's nodes."""
    api_key = run.serve.api_key or os.environ.get(API_KEY)
    admin_key = run.serve.admin_key or os.environ.get(ADMIN_KEY)
    return replace(run, serve=replace(run.serve, api_key=api_key or None, admin_key=admin_key or None))


# Its life -------------------------------------------------------------------------------------------------------------------


def _start(run: ServeRun, port: int) -> None:
    serve.start(
        proxy_location="EveryNode", http_options=http_options(run, port), logging_config=LoggingConfig(log_level="WARNING")
    )
    if APP in serve.status().applications:
        raise ResourceError(
            "a server runs on this cluster already",
            "Stop it first, or write its new config with serve.write=serve.yaml and update it with `serve deploy serve.yaml`.",
        )


def update(run: ServeRun, *, build: BuildEngine | None = None) -> None:
    """Deploy it, or take the place of what is deployed: replica by replica, each with drain_s for the answers that it makes."""
    target = serve.RunTarget(target=application(_with_keys(_placed(run)), build=build), name=APP, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)


def _wait_until_ready(run: ServeRun, port: int, told: Told) -> None:
    """Until the first request would be answered."""
    said = ""
    while True:
        app = serve.status().applications[APP]
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise _failed(app)
        if app.status == ApplicationStatus.RUNNING and _answers(run, port):
            told(f"ready at http://{run.serve.host}:{port}")
            return
        if ENGINE in app.deployments:
            states = app.deployments[ENGINE].replica_states
            text = ", ".join(f"{number} {str(getattr(state, 'value', state)).lower()}" for state, number in states.items())
            if text != said:
                told(f"replicas: {text}")
                said = text
        time.sleep(POLL_S)


def _answers(run: ServeRun, port: int) -> bool:
    if isinstance(run.resources, Cluster):
        return True  # its address is not for this machine to reach
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(run.serve.host, run.serve.host)
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _failed(app: Any) -> Exception:
    texts = [app.message, *(deployment.message for deployment in app.deployments.values())]
    for text in texts:
        if found := re.search(rf"{REFUSED} (.+)", text):
            return ResourceError(found[1].strip().rstrip("."))
    return ResourceError(f"the server did not start: {' '.join(texts).strip()[-2000:]}", "Its logs are in Ray's session folder.")


def _watch_over(told: Told) -> None:
    before = ApplicationStatus.RUNNING
    while True:
        time.sleep(WATCH_S)
        status = serve.status().applications[APP].status
        if status != before:
            told(f"the server is {str(status.value).lower()}")
            before = status


def _stop(run: ServeRun, *, hurried: Callable[[], bool]) -> None:
    """Running answers first have drain_s to end, unless somebody asks again. On a cluster, Serve itself stays for others."""
    until = time.monotonic() + run.serve.drain_s + SPARE_S
    if APP in serve.status().applications:
        serve.delete(APP, _blocking=False)
    while APP in serve.status().applications and time.monotonic() < until and not hurried():
        time.sleep(POLL_S)

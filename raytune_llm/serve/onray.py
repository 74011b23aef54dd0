"""`serve` with resources=local or cluster: deploys the application on Ray Serve, monitors it, and drains it at the end.

One of the few files that import ray.
"""

from __future__ import annotations

import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, LoggingConfig

from raytune_llm import interrupts, session
from raytune_llm.atomic_file import write_atomically
from raytune_llm.config.plain import to_yaml_text
from raytune_llm.config.resources import on_cluster, uses_ray
from raytune_llm.config.run import ADMIN_KEY, API_KEY, ServeRun
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.serve.app import APP, ENGINE, INGRESS_CPUS, TRANSPORT, application, deploy_config, http_options
from raytune_llm.serve.engines import base_name, check_names, check_servable, other_bases
from raytune_llm.serve.port import kept_for_ray, url_of
from raytune_llm.serve.replica import REFUSED, BuildEngine

logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its messages about the deployment would repeat ours
POLL_S = 0.2
WATCH_S = 2.0
SHUTDOWN_MARGIN_S = 15.0
"""Time after drain_s for Ray Serve to stop the drained replicas."""
Notify = Callable[[str], None]


def write(run: ServeRun, *, notify: Notify) -> None:
    """`serve.write`: write the config for a RayService or `serve deploy` to a file. Raises ConfigError if that fails."""
    assert run.serve.write is not None and uses_ray(run.resources)
    check_names(run.model, run.serve)
    path = Path(run.serve.write)
    cpus, gpus = run.resources.cpus_per_worker, run.resources.gpus_per_worker
    # This machine's resources say nothing about the cluster's.
    sized = _sized(run, cpus=1.0 if cpus == "auto" else cpus, gpus=1.0 if gpus == "auto" else gpus)
    name = base_name(run.model, run.serve)
    head = f"# Ray Serve's config of a server of {name}, for `serve deploy` or a RayService's serveConfigV2.\n"
    try:
        write_atomically(path, head + to_yaml_text(deploy_config(sized)))
    except OSError as error:
        raise ConfigError("serve.write", f"must be a file that can be written ({error.strerror})", got=str(path)) from None
    notify(f"wrote {path}")
    if gpus == "auto":
        notify("each replica takes one GPU: set resources.gpus_per_worker=0 for nodes without GPUs")


def serve_on_ray(run: ServeRun, *, notify: Notify, build: BuildEngine | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM, then drain and raise KeyboardInterrupt or Terminated.

    notify: called with one line of text at each stage. build: makes the engine, in place of the one in the settings.
    """
    check_names(run.model, run.serve)
    with _port(run) as port:
        _serve(run, port, notify, build)


def _serve(run: ServeRun, port: int, notify: Notify, build: BuildEngine | None) -> None:
    resources = run.resources
    assert uses_ray(resources)
    if build is None:
        check_servable(run.model, run.quantization, run.engine, run.serve)
        for line in other_bases(run.model, run.serve):
            notify(line)
    joined, is_ours = ray.is_initialized(), False
    with interrupts.first_signal_raises() as later:
        try:
            notify("joining the cluster" if on_cluster(resources) else "starting Ray")
            if not on_cluster(resources):
                for name, value in TRANSPORT.items():
                    os.environ.setdefault(name, value)
            session.connect(resources)
            _start(run, port)
            is_ours = True
            update(run, build=build)
            _wait_until_ready(run, port, notify)
            _watch_over(notify)
        except KeyboardInterrupt:
            notify("draining")
            raise
        finally:
            if is_ours:
                _stop(run, hurried=lambda: later.number > 0)
            if not joined:
                ray.shutdown()
            if later.first is not None:
                notify("stopped")


# Before anything is deployed ----------------------------------------------------------------------------------------------


@contextmanager
def _port(run: ServeRun) -> Iterator[int]:
    """The port to serve on; a free one if serve.port is 0. Whether it is free on a cluster's nodes can't be checked here."""
    if on_cluster(run.resources):
        if run.serve.port == 0:
            fix = "For example, serve.port=8000."
            raise ConfigError("serve.port", "must be given with resources=cluster: every node uses the same port", got=0, fix=fix)
        yield run.serve.port
        return
    with kept_for_ray(run.serve.host, run.serve.port) as port:
        yield port


def _placed(run: ServeRun) -> ServeRun:
    """The run with `auto` replaced by the CPUs and GPUs of a replica. Raises ResourceError if they don't fit this machine."""
    resources = run.resources
    assert uses_ray(resources)
    there, fewest = ray.cluster_resources(), run.serve.min_replicas
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if there.get("GPU", 0) else 0.0
    cpus = resources.cpus_per_worker
    if cpus == "auto":
        spare = there.get("CPU", 0.0) - 2 * INGRESS_CPUS
        cpus = round(spare / run.serve.max_replicas, 2) if not on_cluster(resources) and not gpus else 1.0
    for kind, each, spare in (("CPU", cpus, INGRESS_CPUS), ("GPU", gpus, 0.0)):
        # A cluster may scale up; this machine can't.
        if not on_cluster(resources) and each * fewest > there.get(kind, 0.0) - spare:
            raise ResourceError(
                f"{fewest} replicas with {each:g} {kind}s each don't fit this machine's {there.get(kind, 0.0):g}",
                f"Lower serve.replicas or resources.{kind.lower()}s_per_worker.",
            )
    return _sized(run, cpus=float(cpus), gpus=float(gpus))


def _sized(run: ServeRun, *, cpus: float, gpus: float) -> ServeRun:
    assert uses_ray(run.resources)
    return replace(run, resources=replace(run.resources, cpus_per_worker=cpus, gpus_per_worker=gpus))


def _with_keys(run: ServeRun) -> ServeRun:
    """API keys of this process's environment, since the cluster's nodes don't have them."""
    api_key = run.serve.api_key or os.environ.get(API_KEY)
    admin_key = run.serve.admin_key or os.environ.get(ADMIN_KEY)
    return replace(run, serve=replace(run.serve, api_key=api_key or None, admin_key=admin_key or None))


# Deployment ---------------------------------------------------------------------------------------------------------------


def _start(run: ServeRun, port: int) -> None:
    serve.start(
        proxy_location="EveryNode", http_options=http_options(run, port), logging_config=LoggingConfig(log_level="WARNING")
    )
    if APP in serve.status().applications:
        raise ResourceError(
            "a server is already running on this cluster",
            "Stop it first, or write the new config with serve.write=serve.yaml and apply it with `serve deploy serve.yaml`.",
        )


def update(run: ServeRun, *, build: BuildEngine | None = None) -> None:
    """Deploy the application, or update a deployed one replica by replica; each old replica has drain_s to finish its answers."""
    target = serve.RunTarget(target=application(_with_keys(_placed(run)), build=build), name=APP, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)


def _wait_until_ready(run: ServeRun, port: int, notify: Notify) -> None:
    """Wait until the server answers /health. Raises ResourceError if the deployment failed."""
    said = ""
    while True:
        app = serve.status().applications[APP]
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise _failed(app)
        if app.status == ApplicationStatus.RUNNING and _answers(run, port):
            notify(f"ready at {url_of(run.serve.host, port)}")
            return
        if ENGINE in app.deployments:
            states = app.deployments[ENGINE].replica_states
            text = ", ".join(f"{number} {str(getattr(state, 'value', state)).lower()}" for state, number in states.items())
            if text != said:
                notify(f"replicas: {text}")
                said = text
        time.sleep(POLL_S)


def _answers(run: ServeRun, port: int) -> bool:
    if on_cluster(run.resources):
        return True  # this machine may not reach the cluster's network
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(run.serve.host, run.serve.host)
    try:
        with urllib.request.urlopen(f"{url_of(host, port)}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _failed(app: Any) -> Exception:
    texts = [app.message, *(deployment.message for deployment in app.deployments.values())]
    for text in texts:
        if found := re.search(rf"{REFUSED} (.+)", text):
            return ResourceError(found[1].strip().rstrip("."))
    return ResourceError(f"the server did not start: {' '.join(texts).strip()[-2000:]}", "Its logs are in Ray's session folder.")


def _watch_over(notify: Notify) -> None:
    before = ApplicationStatus.RUNNING
    while True:
        time.sleep(WATCH_S)
        status = serve.status().applications[APP].status
        if status != before:
            notify(f"the server is {str(status.value).lower()}")
            before = status


def _stop(run: ServeRun, *, hurried: Callable[[], bool]) -> None:
    """Running answers get drain_s to finish, unless a second signal arrives. On a cluster, Ray Serve itself keeps running."""
    until = time.monotonic() + run.serve.drain_s + SHUTDOWN_MARGIN_S
    if APP in serve.status().applications:
        serve.delete(APP, _blocking=False)
    while APP in serve.status().applications and time.monotonic() < until and not hurried():
        time.sleep(POLL_S)

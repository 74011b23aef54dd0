"""A RayService's Serve config, against Ray Serve's own schema, our settings and the nodes that it gets."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from pydantic import ValidationError

from raytune_llm.config.parts import run_of
from raytune_llm.errors import ConfigError
from scripts.manifests.entrypoints import of_workers
from scripts.manifests.nodes import PORTS, ray_pods
from scripts.manifests.workloads import Object, cluster_spec

SECRET = {"name": "serving"}


def check_serve_config(found: Object) -> list[str]:
    """What Ray Serve or the server would refuse, or where no request would arrive. Nothing of other kinds."""
    if found["kind"] != "RayService":
        return []
    from ray.serve.schema import ServeDeploySchema  # a second to import

    config = yaml.safe_load(found["spec"]["serveConfigV2"]) or {}
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return [f"serveConfigV2: {problem['loc']}: {problem['msg']}" for problem in error.errors()]
    keys = [where for where, _, ray in ray_pods(found) if SECRET not in (one.get("secretRef") for one in ray.get("envFrom", []))]
    lacking = [f"{where}: the API's keys, the Secret {SECRET['name']}, must be in the environment" for where in keys]
    return lacking + [
        f"serveConfigV2: {problem}" for problem in (*_of_http(config), *_of_server(config, cluster_spec(found) or {}))
    ]


def _of_http(config: Object) -> Iterator[str]:
    reached = config.get("http_options", {})
    if reached.get("host") != "0.0.0.0" or reached.get("port", PORTS["serve"]) != PORTS["serve"]:
        yield f"http_options must be host 0.0.0.0 and port {PORTS['serve']}, or KubeRay's service reaches nobody, got {reached}"
    if config.get("proxy_location") != "EveryNode":
        yield "proxy_location must be EveryNode: the head is no part of the service"


def _of_server(config: Object, cluster: Object) -> Iterator[str]:
    for application in config["applications"]:
        try:
            args = application.get("args", {})
            run = run_of("serve", args | {"serve": args.get("serve", {}) | {"api_key": "of the Secret serving"}})
        except ConfigError as error:
            yield str(error)
            continue
        most = max(run.serve.replicas) if isinstance(run.serve.replicas, tuple | list) else run.serve.replicas
        asked, there = most * (run.resources.gpus_per_worker or 0), of_workers(cluster, "nvidia.com/gpu")
        if asked > there:
            yield f"serve.replicas must find room on the nodes' {there:g} GPUs, got {most} of {run.resources.gpus_per_worker:g}"

"""Builds the Ray Serve application: a deployment of HTTP ingresses in front of a deployment of engine replicas.

    applications: [{name: raytune-llm, import_path: "raytune_llm.serve.app:build", args: {...}}]

is the config that `serve.write=FILE` writes. One of the few files that import ray.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, ProxyLocation, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig, ServeDeploySchema

from raytune_llm.config.parts import parts_of, run_of
from raytune_llm.config.resources import on_cluster, uses_ray
from raytune_llm.config.run import ServeRun
from raytune_llm.serve.access import access_of
from raytune_llm.serve.api.app import build_app
from raytune_llm.serve.engines import build_engine, tokenizer_of
from raytune_llm.serve.logs import log_at
from raytune_llm.serve.prompts import Prompts
from raytune_llm.serve.replica import BuildEngine, EngineReplica
from raytune_llm.serve.replicas import ReplicaBackend
from raytune_llm.serve.router import STATS_INTERVAL_S, AdapterRouter
from raytune_llm.spinning import SPINNING

APP, ENGINE, INGRESS = "raytune-llm", "engine", "ingress"
CONTROL_REQUESTS = 64
"""Concurrent calls of a replica in addition to requests for answers: reports and changes of adapters."""
INGRESS_CPUS = 0.1
"""CPUs reserved for an ingress, which computes little. With 0, Ray could place it on a head node that offers no CPUs."""
INGRESS_REQUESTS = 256
"""Concurrent requests of one ingress above which a second ingress is started."""
TRANSPORT = {
    # Tokens are sent between processes by gRPC instead of as Ray objects, and user code runs in the thread that receives them.
    # benchmarks/serve_overhead.py measures the effect, run with other values in its environment.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
"""Environment variables of Serve's processes: Ray Serve has no config fields for these settings."""
TARGET_UTILIZATION = 0.75
"""Autoscaling adds or removes replicas to keep this fraction of an engine's rows in use, on average."""


def build(args: dict[str, Any]) -> Application:
    """The entry point of a serve.yaml, run on the cluster. API keys come from the cluster's environment."""
    return application(run_of("serve", args))


def application(run: ServeRun, *, build: BuildEngine | None = None) -> Application:
    """resources: CPUs and GPUs of one engine, as numbers. build: makes the engine, in place of the one in the settings."""
    serve_settings, rows, resources = run.serve, run.engine.max_rows, run.resources
    assert uses_ray(resources) and "auto" not in (resources.cpus_per_worker, resources.gpus_per_worker)
    answers = rows + serve_settings.max_waiting
    shared: dict[str, Any] = {
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
        "graceful_shutdown_timeout_s": serve_settings.drain_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "max_constructor_retry_count": 3 if on_cluster(resources) else 1,
    }
    deployment: Callable[..., Any] = serve.deployment  # its overloads say less than it takes
    # A Ray instance that was started for this server has these variables already.
    environment = {"env_vars": TRANSPORT | SPINNING} if on_cluster(resources) else {}
    engines_environment = environment | ({} if run.engine.python is None else {"py_executable": run.engine.python})
    engine = deployment(
        EngineReplica,
        name=ENGINE,
        ray_actor_options={
            "num_cpus": resources.cpus_per_worker,
            "num_gpus": resources.gpus_per_worker,
            "runtime_env": engines_environment,
        },
        # The engine itself rejects requests over its limit at once; Serve's router would let them wait.
        max_ongoing_requests=answers + CONTROL_REQUESTS,
        request_router_config=RequestRouterConfig.model_validate(
            {"request_router_class": AdapterRouter, "request_routing_stats_period_s": STATS_INTERVAL_S}
        ),
        **_number(serve_settings.min_replicas, serve_settings.max_replicas, target=max(1.0, TARGET_UTILIZATION * rows)),
        **shared,
    ).bind(run, build or _engine_of)
    ingresses = max(1, round(serve_settings.max_replicas * rows / INGRESS_REQUESTS))
    return deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        ray_actor_options={"num_cpus": INGRESS_CPUS, "runtime_env": environment},
        max_ongoing_requests=serve_settings.max_replicas * answers + CONTROL_REQUESTS,
        **_number(1, ingresses, target=INGRESS_REQUESTS),
        **shared,
    ).bind(run, engine)


class Ingress:
    """Serves the HTTP API. It has no state, so there can be several."""

    async def __init__(self, run: ServeRun, engines: DeploymentHandle) -> None:
        log_at(run.serve.log_level)
        access = access_of(run)
        tokenizer, _ = tokenizer_of(run.model, run.serve)
        facts = await engines.options(method_name="facts").remote()
        self._app = build_app(ReplicaBackend(engines, facts, run.serve.adapters), Prompts(tokenizer), access)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def deploy_config(run: ServeRun) -> dict[str, Any]:
    """The config of this server for `serve deploy`, validated by Ray Serve's schema. API keys are left out."""
    parts = parts_of("serve", run)
    parts.get("serve", {}).pop("write", None)  # the deployed server must serve, not write again
    config = {
        "proxy_location": ProxyLocation.EveryNode.value,
        "http_options": http_options(run, run.serve.port),
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": f"{__name__}:build",
                "args": parts,
            }
        ],
    }
    ServeDeploySchema.model_validate(config)
    return config


def http_options(run: ServeRun, port: int) -> dict[str, Any]:
    return {"host": run.serve.host, "port": port}


def _engine_of(run: ServeRun) -> Any:
    return build_engine(run.model, run.quantization, run.engine, run.serve)


def _number(fewest: int, most: int, *, target: float) -> dict[str, Any]:
    if fewest == most:
        return {"num_replicas": fewest}
    bounds = AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        target_ongoing_requests=target,
        upscale_delay_s=5.0,
        downscale_delay_s=300.0,
    )
    return {"autoscaling_config": bounds}

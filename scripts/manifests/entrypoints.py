"""The commands that manifests run, against the settings that there are and the nodes that they get."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from raytune_llm.config.load import load_config
from raytune_llm.config.resources import Cluster
from raytune_llm.config.run import RUNS, TrainRun
from raytune_llm.config.sweep import load_sweep
from raytune_llm.errors import ConfigError
from scripts.manifests.quantity import amount
from scripts.manifests.workloads import Object, cluster_spec, job_spec

MODULE = "raytune_llm"


def check_entrypoint(found: Object) -> list[str]:
    """What is wrong with a job's command. Nothing of kinds that have none."""
    job = job_spec(found)
    return [] if job is None else list(_wrong(job.get("entrypoint", ""), cluster_spec(found) or {}))


def _wrong(entrypoint: str, cluster: Object) -> Iterator[str]:
    words = shlex.split(entrypoint)
    if words[:2] == ["sh", "-c"]:
        words = shlex.split(words[2].removeprefix("exec "))
    if words[:3] != ["python", "-m", MODULE]:
        yield f"entrypoint must start with python -m {MODULE}, got {entrypoint}"
        return
    words = words[3:]
    verb = words.pop(0) if words and words[0] not in ("--help",) and "=" not in words[0] else "train"
    given = dict(word.split("=", 1) for word in words if "=" in word)
    for setting in ("output_dir", "data.cache"):
        if not given.get(setting, "").startswith("/shared/"):
            yield f"{setting} must be in /shared: a retry runs on other nodes and resumes from there"
    if verb not in RUNS:
        yield f"there is no verb {verb}"
        return
    try:
        words = [word.replace("${RAY_CLUSTER_NAME%-*}", "night") for word in words]
        run = load_sweep(words).run if verb == "tune" else load_config(verb, words)
    except ConfigError as error:
        yield str(error)
        return
    if not isinstance(run.resources, Cluster):
        yield "resources must be cluster"
    elif (least := min(_nodes(cluster), default=0)) < 1:
        yield f"replicas must be at least 1, got {least}: the command counts the workers that are there when it begins"
    elif isinstance(run, TrainRun) and verb != "tune":  # a trial takes a part of the nodes
        yield from _fits(run, run.resources, cluster)


def _fits(run: TrainRun, resources: Cluster, cluster: Object) -> Iterator[str]:
    gpus, cpus = (of_workers(cluster, kind) for kind in ("nvidia.com/gpu", "cpu"))
    if resources.num_workers != (gpus or resources.num_workers):
        yield f"resources.num_workers must be the nodes' {gpus:g} GPUs, got {resources.num_workers}"
    elif not isinstance(resources.num_workers, int) or resources.num_workers > cpus:
        yield f"resources.num_workers must be a number of at most the nodes' {cpus:g} CPUs, got {resources.num_workers}"


def _nodes(cluster: Object) -> list[int]:
    """The workers of each group that KubeRay starts before the job."""
    return [group["replicas"] for group in cluster.get("workerGroupSpecs", [])]


def of_workers(cluster: Object, resource: str) -> float:
    """So much of a resource when all replicas are there."""
    return sum(
        group["maxReplicas"] * amount(group["template"]["spec"]["containers"][0]["resources"]["limits"].get(resource, 0))
        for group in cluster["workerGroupSpecs"]
    )

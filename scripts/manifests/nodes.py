"""What our runs and servers need of their Ray nodes: storage, memory, time to end, ports, GPUs and one image."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from scripts.manifests.quantity import amount
from scripts.manifests.workloads import Object, cluster_spec, job_spec, pod_templates

PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000}
"""Ray's own, which KubeRay's services and base/namespace/network.yaml count on."""
OF_WORKERS = ("metrics", "serve")
STORAGE = "/shared"


def check_nodes(found: Object) -> Iterator[str]:
    """Of an object of KubeRay's kinds."""
    for check in (_start, _ports, _storage, _shared_memory, _grace, _gpus, _image):
        yield from check(found)


def ray_pods(found: Object) -> Iterator[tuple[str, Object, Object]]:
    """Name, template and Ray's container of each Ray node's pod."""
    for where, template in pod_templates(found):
        if where not in ("submitter", "pod"):
            yield where, template, template["spec"]["containers"][0]


def variables(container: Object) -> dict[str, Any]:
    """Its environment, as far as it is said there."""
    return {entry["name"]: str(entry.get("value", "")) for entry in container.get("env", [])}


def _start(found: Object) -> Iterator[str]:
    cluster = cluster_spec(found) or {}
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]
    for group in groups:
        if unknown := group.get("rayStartParams", {}).keys() - _start_options():
            yield f"{group.get('groupName', 'head')}: ray start has no option {', '.join(sorted(unknown))}"
    if cluster and groups[0].get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'head: rayStartParams.num-cpus must be "0": the driver needs the head\'s CPUs, tasks and workers must not take them'
    for where, template, _ in ray_pods(found):
        if template["spec"].get("restartPolicy") != "Never":
            yield f"{where}: restartPolicy must be Never: what restarts in place is another Ray node under the same name"


@cache
def _start_options() -> frozenset[str]:
    from ray.scripts.scripts import start  # seconds to import

    return frozenset(option.lstrip("-") for parameter in start.params for option in parameter.opts)


def _ports(found: Object) -> Iterator[str]:
    for where, _, ray in ray_pods(found):
        there = {port.get("name"): port["containerPort"] for port in ray.get("ports", [])}
        for name in PORTS if where == "head" else OF_WORKERS:
            if there.get(name) != PORTS[name]:
                yield f"{where}: the port {name} must be {PORTS[name]}, got {there.get(name)}"


def _storage(found: Object) -> Iterator[str]:
    claims = set()
    for where, template, ray in ray_pods(found):
        spec = template["spec"]
        if spec.get("securityContext", {}).get("fsGroup") is None:
            yield f"{where}: fsGroup must be set, or a user that is not root can't write to volumes"
        mounts = {mount["mountPath"]: mount for mount in ray.get("volumeMounts", [])}
        if ray.get("securityContext", {}).get("readOnlyRootFilesystem") and "/tmp" not in mounts:
            yield f"{where}: readOnlyRootFilesystem needs a volume at /tmp, which Ray and Python write to"
        mount = mounts.get(STORAGE, {})
        volume = next((volume for volume in spec.get("volumes", []) if volume["name"] == mount.get("name")), {})
        claim = volume.get("persistentVolumeClaim", {})
        if not claim or mount.get("readOnly") or claim.get("readOnly"):
            yield f"{where}: {STORAGE} must be a claim that can be written to: runs are resumed from there"
        claims.add(claim.get("claimName"))
        if not variables(ray).get("HF_HOME", "").startswith(f"{STORAGE}/"):
            yield f"{where}: HF_HOME must be in {STORAGE}: else each node downloads the model to its own disk, for each attempt"
        logs = mounts.get("/tmp/ray", {}).get("name")
        if logs != "ray-logs":
            yield f"{where}: /tmp/ray must be the volume ray-logs, which KubeRay's autoscaler looks for, got {logs}"
    if len(claims) > 1:
        yield f"all nodes must have the same claim at {STORAGE}, got {', '.join(sorted(map(str, claims)))}"


def _shared_memory(found: Object) -> Iterator[str]:
    for where, template, ray in ray_pods(found):
        mounted = {mount["mountPath"]: mount["name"] for mount in ray.get("volumeMounts", [])}
        shm = next((volume for volume in template["spec"].get("volumes", []) if volume["name"] == mounted.get("/dev/shm")), {})
        limit = shm.get("emptyDir", {}).get("sizeLimit")
        if shm.get("emptyDir", {}).get("medium") != "Memory" or limit is None:
            yield f"{where}: /dev/shm must be a memory volume with a limit; a container's own has 64 MiB"
        elif amount(limit) > 0.5 * amount(ray["resources"]["limits"]["memory"]):
            yield f"{where}: /dev/shm counts towards the container's memory and must be at most half of it"


def _grace(found: Object) -> Iterator[str]:
    """Ray drains a node that gets SIGTERM for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, 30 s where that is not set."""
    for where, template, ray in ray_pods(found):
        drain = variables(ray).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "30")
        grace = template["spec"].get("terminationGracePeriodSeconds", 30)
        if not str(drain).isdigit():
            yield f"{where}: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S must be whole seconds, got {drain}"
        elif grace <= int(drain):
            yield f"{where}: terminationGracePeriodSeconds must be more than the {drain} s of draining, got {grace}"


def _gpus(found: Object) -> Iterator[str]:
    for where, template, ray in ray_pods(found):
        tolerated = [one.get("key") for one in template["spec"].get("tolerations", [])]
        if "nvidia.com/gpu" in ray["resources"].get("limits", {}) and "nvidia.com/gpu" not in tolerated:
            yield f"{where}: nodes with GPUs are tainted nvidia.com/gpu, which the pods must tolerate"
    if (job_spec(found) or {}).get("entrypointNumGpus") or (job_spec(found) or {}).get("entrypointNumCpus"):
        yield "entrypointNumCpus and entrypointNumGpus ask for what the head doesn't offer: the job would wait for ever"


def _image(found: Object) -> Iterator[str]:
    images = {template["spec"]["containers"][0]["image"] for _, template in pod_templates(found)}
    if len(images) > 1:
        yield f"head, workers and submitter must have the same image, got {', '.join(sorted(images))}"

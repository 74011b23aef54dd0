"""Where the parts of KubeRay's four kinds lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]


def job_spec(found: Object) -> Object | None:
    """Of a RayJob, or of the jobs that a RayCronJob makes."""
    spec = found.get("spec", {})
    return {"RayJob": spec, "RayCronJob": spec.get("jobTemplate", {})}.get(found["kind"])


def cluster_spec(found: Object) -> Object | None:
    """The cluster of a RayJob, RayService, RayCluster or RayCronJob; None for others, and for a job that selects a cluster."""
    job = job_spec(found)
    if job is not None:
        return job.get("rayClusterSpec")
    spec = found.get("spec", {})
    return {"RayCluster": spec, "RayService": spec.get("rayClusterConfig")}.get(found["kind"])


def pod_templates(found: Object) -> Iterator[tuple[str, Object]]:
    """Each pod template with a name for messages; a Pod is its own."""
    if found["kind"] == "Pod":
        yield "pod", found
    cluster = cluster_spec(found)
    if cluster:
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster.get("workerGroupSpecs", []):
            yield f"group {group['groupName']}", group["template"]
    job = job_spec(found)
    if job and "submitterPodTemplate" in job:
        yield "submitter", job["submitterPodTemplate"]

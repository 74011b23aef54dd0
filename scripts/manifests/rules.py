"""What a schema can't say of a manifest: KubeRay's own rules, Kueue's, and ours.

KubeRay's are those of its operator (ray-operator/controllers/ray/utils/validation.go, commit feeaf72 of August 2026), as far
as they touch fields that are used here: the API server takes a manifest that breaks one, the operator refuses it. Kueue's
are those of its webhooks for RayJob, RayCluster and RayService (commit ff69552 of August 2026).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from packaging.version import Version

from scripts.manifests.workloads import Object, cluster_spec, job_spec, pod_templates

NAME_LENGTHS = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "RayCronJob": 41}
"""So that names with KubeRay's suffixes stay within the 63 characters of a label."""
QUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
MAX_POD_SETS = 18
SUFFIXES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3, "": 1}


def check_rules(found: Object) -> list[str]:
    """What one object of KubeRay's kinds breaks."""
    return [broken for rule in RULES for broken in rule(found)]


def _names(found: Object) -> Iterator[str]:
    name, most = found["metadata"]["name"], NAME_LENGTHS[found["kind"]]
    if len(name) > most:
        yield f"metadata.name must have at most {most} characters, got {len(name)}"
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"metadata.name must be a DNS-1035 label, got {name}"


def _cluster_is_there(found: Object) -> Iterator[str]:
    job = job_spec(found)
    if not cluster_spec(found) and not (job or {}).get("clusterSelector"):
        yield "no Ray nodes: components/into-workload must be among the components"


def _groups(found: Object) -> Iterator[str]:
    cluster = cluster_spec(found) or {}
    for group in [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]:
        name = group.get("groupName", "head")
        started = group.get("rayStartParams", {})
        if "labels" in started:
            yield f"{name}: labels belong into the group's labels, not into rayStartParams"
        if group.get("resources") and started.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield f"{name}: resources must be in rayStartParams or in resources, not in both"
    for group in cluster.get("workerGroupSpecs", []):
        least, now, most = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        if None in (least, now, most) or not 0 <= least <= now <= most:
            yield f"{group['groupName']}: 0 <= minReplicas <= replicas <= maxReplicas must hold, got {least}, {now}, {most}"


def _autoscaler(found: Object) -> Iterator[str]:
    cluster = cluster_spec(found) or {}
    options = cluster.get("autoscalerOptions", {})
    if not cluster.get("enableInTreeAutoscaling"):
        if options:
            yield "autoscalerOptions without enableInTreeAutoscaling"
        if any("idleTimeoutSeconds" in group for group in cluster.get("workerGroupSpecs", [])):
            yield "a group's idleTimeoutSeconds needs the autoscaler, version v2"
        return
    if options.get("version") != "v2":
        yield "autoscalerOptions.version must be v2"
    for where, template in pod_templates(found):
        if where != "submitter" and template["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{where}: restartPolicy must be Never with autoscaler v2"
    if cluster["headGroupSpec"]["template"]["spec"].get("automountServiceAccountToken") is False:
        yield "head: the autoscaler needs automountServiceAccountToken"


def _token(found: Object) -> Iterator[str]:
    cluster = cluster_spec(found) or {}
    auth = cluster.get("authOptions", {})
    if auth.get("mode") != "token":
        yield "authOptions.mode must be token: whoever reaches the dashboard's port runs code on all nodes"
    elif Version(cluster.get("rayVersion", "0")) < Version("2.52.0"):
        yield "token authentication needs rayVersion of at least 2.52.0"
    if auth.get("enableK8sTokenAuth") and found["kind"] != "RayCluster":
        yield "authOptions.enableK8sTokenAuth is for RayClusters only"


def _head_state(found: Object) -> Iterator[str]:
    cluster = cluster_spec(found) or {}
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        return
    if job_spec(found) is not None:
        yield "gcsFaultToleranceOptions is of no use to a job: its driver dies with the head"
    rocks = options.get("backend") == "rocksdb"
    if rocks and options.keys() & {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"}:
        yield "gcsFaultToleranceOptions: Redis settings with the backend rocksdb"
    if not rocks and "storage" in options:
        yield "gcsFaultToleranceOptions.storage is for the backend rocksdb"
    storage = options.get("storage", {})
    if "claimName" in storage and storage.keys() & {"size", "storageClassName", "accessModes"}:
        yield "gcsFaultToleranceOptions.storage.claimName excludes size, storageClassName and accessModes"


def _jobs(found: Object) -> Iterator[str]:
    job = job_spec(found)
    if job is None:
        return
    shutdown, selects, mode = (
        job.get("shutdownAfterJobFinishes"),
        "clusterSelector" in job,
        job.get("submissionMode", "K8sJobMode"),
    )
    if job.get("suspend") and (not shutdown or selects):
        yield "suspend needs shutdownAfterJobFinishes and excludes clusterSelector"
    if job.get("ttlSecondsAfterFinished") and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if "deletionRules" in job.get("deletionStrategy", {}) and shutdown:
        yield "deletionStrategy.deletionRules excludes shutdownAfterJobFinishes"
    if job.get("backoffLimit") and (selects or mode == "InteractiveMode"):
        yield "backoffLimit excludes clusterSelector and InteractiveMode"
    if mode == "SidecarMode" and (selects or job.keys() & {"submitterPodTemplate", "submitterConfig"}):
        yield "SidecarMode excludes clusterSelector, submitterPodTemplate and submitterConfig"
    if not isinstance(yaml.safe_load(job.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML must be a mapping"
    for deadline in ("preRunningDeadlineSeconds", "activeDeadlineSeconds"):
        if job.get(deadline, 0) <= 0:
            yield f"{deadline} must be set: a job that can't start or doesn't end would hold its GPUs for ever"


def _schedules(found: Object) -> Iterator[str]:
    if found["kind"] != "RayCronJob":
        return
    schedule, zone = found["spec"]["schedule"], found["spec"].get("timeZone")
    if "TZ" in schedule:
        yield "schedule must not name a time zone: timeZone does"
    if not re.fullmatch(r"(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|[-\d*/,]+( [-\w*/,?]+){4})", schedule):
        yield f"schedule must be a cron expression of five fields, got {schedule}"
    try:
        ZoneInfo(zone or "UTC")
    except (ZoneInfoNotFoundError, ValueError):
        yield f"timeZone is not known: {zone}"
    if QUEUE in found["metadata"].get("labels", {}):
        yield f"the label {QUEUE} doesn't reach the jobs of a RayCronJob"


def _queued(found: Object) -> Iterator[str]:
    metadata, cluster = found["metadata"], cluster_spec(found) or {}
    if QUEUE not in metadata.get("labels", {}):
        return
    if "suspend" in found["spec"]:
        yield "spec.suspend is Kueue's to set"
    job = job_spec(found)
    if job is not None and (not job.get("shutdownAfterJobFinishes") or "clusterSelector" in job):
        yield "Kueue needs shutdownAfterJobFinishes and refuses clusterSelector"
    groups = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
    if "head" in groups:
        yield "Kueue refuses a worker group of the name head"
    if 1 + len(groups) + (job is not None) > MAX_POD_SETS:
        yield f"Kueue takes at most {MAX_POD_SETS} kinds of pods: head, worker groups and submitter"
    if cluster.get("enableInTreeAutoscaling") and metadata.get("annotations", {}).get(ELASTIC) != "true":
        yield f"Kueue refuses the autoscaler without the annotation {ELASTIC}"


def pods_are_restricted(found: Object) -> Iterator[str]:
    """The Pod Security Standard `restricted`, which the namespace enforces, and limits for all."""
    for where, template in pod_templates(found):
        spec = template["spec"]
        yield from _restricted(where, spec)
        for container in spec["containers"]:
            resources = container.get("resources", {})
            for kind in ("requests", "limits"):
                if missing := {"cpu", "memory"} - resources.get(kind, {}).keys():
                    yield f"{where}: {container['name']} has no {kind} of {', '.join(sorted(missing))}"
            yield from _unprivileged(f"{where}: {container['name']}", container)
            if not re.search(r":[\w][\w.-]*$", container["image"]) or container["image"].endswith(":latest"):
                yield f"{where}: the image needs a tag that stays, got {container['image']}"
    options = (cluster_spec(found) or {}).get("autoscalerOptions")
    if options is not None:
        yield from _unprivileged("autoscaler", options)


def _restricted(where: str, spec: Object) -> Iterator[str]:
    context = spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield f"{where}: must run as a user that is not root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{where}: seccompProfile must be RuntimeDefault"
    if spec.keys() & {"hostNetwork", "hostPID", "hostIPC"} or any("hostPath" in volume for volume in spec.get("volumes", [])):
        yield f"{where}: must not use the host's network, processes or paths"


def _unprivileged(where: str, container: Object) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities", {}).get("drop") != ["ALL"]:
        yield f"{where}: must drop all capabilities and not allow privilege escalation"


def _shared_memory(found: Object) -> Iterator[str]:
    for where, template in pod_templates(found):
        if where == "submitter":
            continue
        ray = template["spec"]["containers"][0]
        mounted = {mount["mountPath"]: mount["name"] for mount in ray.get("volumeMounts", [])}
        shm = next((volume for volume in template["spec"].get("volumes", []) if volume["name"] == mounted.get("/dev/shm")), {})
        limit = shm.get("emptyDir", {}).get("sizeLimit")
        if shm.get("emptyDir", {}).get("medium") != "Memory" or limit is None:
            yield f"{where}: /dev/shm must be a memory volume with a limit; a container's own has 64 MiB"
        elif amount(limit) > 0.5 * amount(ray["resources"]["limits"]["memory"]):
            yield f"{where}: /dev/shm counts towards the container's memory and must be at most half of it"


def _grace(found: Object) -> Iterator[str]:
    """Ray drains a node that gets SIGTERM for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, 30 s where that is not set."""
    for where, template in pod_templates(found):
        if where != "submitter":
            drain = variables(template).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "30")
            grace = template["spec"].get("terminationGracePeriodSeconds", 30)
            if grace <= float(drain):
                yield f"{where}: terminationGracePeriodSeconds must be more than the {drain} s of draining, got {grace}"


RULES: tuple[Callable[[Object], Iterator[str]], ...] = (
    _names,
    _cluster_is_there,
    _groups,
    _autoscaler,
    _token,
    _head_state,
    _jobs,
    _schedules,
    _queued,
    pods_are_restricted,
    _shared_memory,
    _grace,
)


def variables(template: Object) -> dict[str, Any]:
    """The environment of a template's first container, as far as it is said there."""
    return {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0].get("env", [])}


def amount(quantity: Any) -> float:
    """Of a Kubernetes quantity, in its unit: 16Gi is 2**34."""
    number, suffix = re.fullmatch(r"([\d.]+)(\w*)", str(quantity)).groups()  # type: ignore[union-attr]
    return float(number) * SUFFIXES[suffix]

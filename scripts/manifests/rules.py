"""What a schema can't say of a manifest: KubeRay's own rules, Kueue's, and ours.

KubeRay's are those of its operator (ray-operator/controllers/ray/utils/validation.go, commit feeaf72 of August 2026), as far
as they touch fields that are used here: the API server takes a manifest that breaks one, the operator refuses it. Kueue's
are those of its webhooks for RayJob, RayCluster and RayService (commit ff69552 of August 2026).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from packaging.version import Version

from scripts.manifests.nodes import check_nodes, ray_pods, variables
from scripts.manifests.pods import check_pods
from scripts.manifests.quantity import QuantityError
from scripts.manifests.workloads import Object, cluster_spec, job_spec

NAME_LENGTHS = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "RayCronJob": 41}
"""So that names with KubeRay's suffixes stay within the 63 characters of a label."""
QUEUE = "kueue.x-k8s.io/queue-name"
MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade")
CRON = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
"""The least and the largest number of each field."""
ELASTIC = "kueue.x-k8s.io/elastic-job"
MAX_POD_SETS = 18


def check_rules(found: Object) -> list[str]:
    """What one object of KubeRay's kinds breaks."""
    return [broken for rule in RULES for broken in broken_of(rule, found)]


def broken_of(rule: Callable[[Object], Iterable[str]], found: Object) -> list[str]:
    try:
        return list(rule(found))
    except QuantityError as error:
        return [str(error)]


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
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
    if len({*names}) < len(names) or not all(re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) for name in names):
        yield f"groupName must be a DNS-1035 label of one group alone, got {', '.join(names)}"
    for group in cluster.get("workerGroupSpecs", []):
        if group.get("numOfHosts", 1) != 1:
            yield f"{group['groupName']}: numOfHosts is for TPUs, got {group['numOfHosts']}"
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
    if options.get("idleTimeoutSeconds", 60) <= 0:
        yield f"autoscalerOptions.idleTimeoutSeconds must be positive, got {options['idleTimeoutSeconds']}"
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
    if not rocks and "redisAddress" not in options:
        yield "gcsFaultToleranceOptions needs redisAddress, or the backend rocksdb"
    if "value" in options.get("redisPassword", {}):
        yield "gcsFaultToleranceOptions.redisPassword must come from a Secret (valueFrom.secretKeyRef)"
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
    if mode not in MODES:
        yield f"submissionMode must be one of {', '.join(MODES)}, got {mode}"
    if mode != "InteractiveMode" and min(job.get("backoffLimit", 0), job.get("submitterConfig", {}).get("backoffLimit", 2)) < 1:
        yield "backoffLimit, of the job and of its submitter, must be at least 1: a lost head is a failed attempt, which resumes"
    if "jobId" in job and job.get("backoffLimit"):
        yield "jobId must not be set: each attempt submits a job of its own"
    submitter = job.get("submitterPodTemplate", {}).get("spec", {}).get("restartPolicy", "Never")
    if submitter not in ("Never", "OnFailure"):
        yield f"submitter: restartPolicy must be Never or OnFailure, as of every Kubernetes Job, got {submitter}"
    if job.get("ttlSecondsAfterFinished", 0) < 0:
        yield f"ttlSecondsAfterFinished must not be negative, got {job['ttlSecondsAfterFinished']}"
    if job.get("activeDeadlineSeconds", 0) <= job.get("preRunningDeadlineSeconds", 0):
        yield "activeDeadlineSeconds must be more than preRunningDeadlineSeconds, which it includes"
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
    for field, (least, most) in zip(schedule.split(), CRON, strict=False):
        if any(not least <= int(number) <= most for number in re.findall(r"(?<!/)\b\d+", field)):
            yield f"schedule must have numbers of {least} to {most} in its place, got {field}"
    if "RAY_CLUSTER_NAME" not in (job_spec(found) or {}).get("entrypoint", ""):
        yield "output_dir must be named after RAY_CLUSTER_NAME without its last part: each night has a folder of its own"
    if not any("RAY_CLUSTER_NAME" in variables(ray) for where, _, ray in ray_pods(found) if where == "head"):
        yield "head: RAY_CLUSTER_NAME must be in the environment (base/schedule)"
    try:
        ZoneInfo(zone or "UTC")
    except (ZoneInfoNotFoundError, ValueError):
        yield f"timeZone is not known: {zone}"
    if QUEUE in found["metadata"].get("labels", {}):
        yield f"the label {QUEUE} doesn't reach the jobs of a RayCronJob"


def _services(found: Object) -> Iterator[str]:
    if found["kind"] != "RayService":
        return
    strategy, cluster = found["spec"].get("upgradeStrategy", {}), cluster_spec(found) or {}
    kind = strategy.get("type", "NewCluster")
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type must be one of {', '.join(UPGRADES)}: with None changed nodes are not updated, got {kind}"
    if kind == UPGRADES[1] and not (
        cluster.get("enableInTreeAutoscaling") and strategy.get("clusterUpgradeOptions", {}).get("gatewayClassName")
    ):
        yield f"{kind} needs enableInTreeAutoscaling and clusterUpgradeOptions.gatewayClassName"
    if found["spec"].get("rayClusterDeletionDelaySeconds", 60) < 60:
        yield "rayClusterDeletionDelaySeconds must be at least 60: answers still run on the old nodes after an update"


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


RULES: tuple[Callable[[Object], Iterator[str]], ...] = (
    _names,
    _cluster_is_there,
    _groups,
    _autoscaler,
    _token,
    _head_state,
    _jobs,
    _schedules,
    _services,
    _queued,
    check_pods,
    check_nodes,
)

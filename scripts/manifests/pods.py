"""What the API server and the Pod Security Standard `restricted` refuse of a pod, beyond its schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scripts.manifests.quantity import amount
from scripts.manifests.workloads import Object, cluster_spec, pod_templates

ALLOWED: Mapping[str, Sequence[str]] = {
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "operator": ("Exists", "Equal", "In", "NotIn", "DoesNotExist", "Gt", "Lt"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "fsGroupChangePolicy": ("Always", "OnRootMismatch"),
    "medium": ("", "Memory"),
}
"""Fields with few values, which Kubernetes' schema takes for any text."""
EXTENDED = "nvidia.com/gpu"


def check_pods(found: Object) -> Iterator[str]:
    """Of each pod template of an object."""
    for where, template in pod_templates(found):
        spec = template["spec"]
        yield from (f"{where}: {problem}" for problem in (*_of_values(spec), *_of_volumes(spec), *_restricted(spec)))
        for container in _containers(spec):
            name = f"{where}: {container['name']}"
            yield from (f"{name} {problem}" for problem in (*_of_resources(container), *_of_lists(container)))
            yield from _unprivileged(name, container)
            if not _has_fixed_tag(container["image"]):
                yield f"{where}: the image needs a tag that stays, got {container['image']}"
    options = (cluster_spec(found) or {}).get("autoscalerOptions")
    if options is not None:
        yield from (f"autoscaler {problem}" for problem in _of_resources(options))
        yield from _unprivileged("autoscaler", options)


def _containers(spec: Object) -> list[Object]:
    return [*spec["containers"], *spec.get("initContainers", [])]


def _of_values(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _of_values(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ALLOWED and isinstance(value, str) and value not in ALLOWED[key]:
                yield f"{key} must be one of {', '.join(filter(None, ALLOWED[key]))}, got {value}"
            if key == "weight" and isinstance(value, int) and not 1 <= value <= 100:
                yield f"weight must be 1 to 100, got {value}"
            yield from _of_values(value)


def _of_volumes(spec: Object) -> Iterator[str]:
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    for name in sorted(name for name, times in Counter(volumes).items() if times > 1):
        yield f"the volume {name} is there twice"
    for container in _containers(spec):
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"there is no volume {mount['name']} for {mount['mountPath']}"


def _of_resources(container: Object) -> Iterator[str]:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for kind, given in (("requests", requests), ("limits", limits)):
        if missing := {"cpu", "memory"} - given.keys():
            yield f"has no {kind} of {', '.join(sorted(missing))}"
    for name in requests.keys() & limits.keys():
        if amount(requests[name]) > amount(limits[name]):
            yield f"requests more {name} than its limit, {requests[name]} of {limits[name]}"
    gpus = requests.get(EXTENDED), limits.get(EXTENDED)
    if gpus[0] not in (None, gpus[1]):
        yield f"must have the same request and limit of {EXTENDED}, got {gpus[0]} and {gpus[1]}"
    if any(gpu is not None and amount(gpu) % 1 for gpu in gpus):
        yield f"must have whole GPUs, got {gpus[1] or gpus[0]}"


def _of_lists(container: Object) -> Iterator[str]:
    for field, key in (("env", "name"), ("ports", "containerPort"), ("ports", "name"), ("volumeMounts", "mountPath")):
        times = Counter(entry.get(key) for entry in container.get(field, []))
        for one in (one for one, count in times.items() if one is not None and count > 1):
            yield f"has the {key} {one} twice in {field}"


def _restricted(spec: Object) -> Iterator[str]:
    context = spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "must run as a user that is not root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile must be RuntimeDefault"
    if spec.keys() & {"hostNetwork", "hostPID", "hostIPC"} or any("hostPath" in volume for volume in spec.get("volumes", [])):
        yield "must not use the host's network, processes or paths"


def _unprivileged(where: str, container: Object) -> Iterator[str]:
    context = container.get("securityContext", {})
    capabilities = context.get("capabilities", {})
    if context.get("allowPrivilegeEscalation") is not False or capabilities.get("drop") != ["ALL"]:
        yield f"{where}: must drop all capabilities and not allow privilege escalation"
    if context.get("privileged") or capabilities.get("add"):
        yield f"{where}: must not be privileged or add capabilities"
    if context.get("runAsNonRoot") is False or context.get("runAsUser") == 0:
        yield f"{where}: must run as a user that is not root"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield f"{where}: must not use the host's ports"


def _has_fixed_tag(image: str) -> bool:
    name, _, tag = image.rpartition(":")
    return bool(name) and "/" not in tag and tag not in ("", "latest")

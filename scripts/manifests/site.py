"""What overlays need of the namespace that they are applied to: its service account, claim, queue and network rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from scripts.manifests.nodes import PORTS
from scripts.manifests.quantity import amount
from scripts.manifests.rules import QUEUE
from scripts.manifests.workloads import Object, pod_templates

MODES = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
BY_KUBERAY = {"ray.io/is-ray-node": "yes"}
"""The labels that KubeRay gives to nodes."""


@dataclass(frozen=True)
class End:
    """An end of a connection: a pod of our namespace or of another, or an address outside."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: Mapping[str, str] | None = None
    """Labels of another namespace. None: ours."""
    address: str | None = None


OPERATOR = End({"app.kubernetes.io/name": "kuberay-operator"}, namespace={})
CLIENT, MONITOR = (End(namespace={f"raytune-llm/{who}": "true"}) for who in ("clients", "monitoring"))
STRANGER, HUB, METADATA = End(namespace={}), End(address="203.0.113.1"), End(address="169.254.169.254")


def check_site(site: Sequence[Object], overlays: Mapping[str, Sequence[Object]]) -> Iterator[str]:
    """site: the objects of setup and setup-queue, or of setup-kind. overlays: those that are applied there."""
    there = {(found["kind"], found["metadata"]["name"]) for found in site}
    yield from _claims(site, one_node="kind" in next(iter(overlays), ""))
    if not any(_enforced(found) == "restricted" for found in site):
        yield "the namespace must enforce the Pod Security Standard restricted"
    for found in site:
        if found["kind"] == "LocalQueue" and ("ClusterQueue", name := found["spec"]["clusterQueue"]) not in there:
            yield f"there is no ClusterQueue {name}"
    for overlay, objects in overlays.items():
        for found in objects:
            for kind, name in _needed(found):
                if (kind, name) not in there:
                    yield f"{overlay}: there is no {kind} {name}"
            for where, template in pod_templates(found):
                yield from (f"{overlay}: {where}: {problem}" for problem in _network(where, template, site))


def _enforced(found: Object) -> str | None:
    return found["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")


def _claims(site: Sequence[Object], *, one_node: bool) -> Iterator[str]:
    for found in site:
        if found["kind"] != "PersistentVolumeClaim":
            continue
        modes, size = found["spec"]["accessModes"], found["spec"]["resources"].get("requests", {}).get("storage")
        if not set(modes) <= set(MODES):
            yield f"accessModes must be of {', '.join(MODES)}, got {', '.join(modes)}"
        if "ReadWriteMany" not in modes and not one_node:
            yield f"accessModes must have ReadWriteMany: nodes on several machines write to it, got {', '.join(modes)}"
        if size is None or amount(size) <= 0:
            yield f"the claim {found['metadata']['name']} must say its size, got {size}"


def _needed(found: Object) -> Iterator[tuple[str, str]]:
    yield "Namespace", found["metadata"].get("namespace", "default")
    if queue := found["metadata"].get("labels", {}).get(QUEUE):
        yield "LocalQueue", queue
    for _, template in pod_templates(found):
        yield "ServiceAccount", template["spec"].get("serviceAccountName", "default")
        for volume in template["spec"].get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                yield "PersistentVolumeClaim", claim["claimName"]


def _network(where: str, template: Object, site: Sequence[Object]) -> Iterator[str]:
    """Connections that a pod must be able to make or take, and those that it must not."""
    pod = End({**template["metadata"].get("labels", {}), **({} if where in ("submitter", "pod") else BY_KUBERAY)})
    node = End({"app.kubernetes.io/part-of": "raytune-llm", **BY_KUBERAY})
    outward = [("names", STRANGER, 53, "UDP"), ("HTTPS outside", HUB, 443, "TCP")]
    if where == "submitter":
        outward.append(("the head", node, PORTS["dashboard"], "TCP"))
    for what, to, port, protocol in outward:
        if not allowed(site, pod, to, port, protocol):
            yield f"the network rules let it not reach {what} (port {port})"
    if allowed(site, pod, METADATA, 443):
        yield "the network rules let it reach the cloud's metadata service, which gives out the machine's credentials"
    if where in ("submitter", "pod"):
        return
    inward = [("other nodes", node, port) for port in (PORTS["gcs-server"], 45678)]
    inward += [("KubeRay", OPERATOR, PORTS[name]) for name in ("dashboard", "serve")]
    inward += [("clients", CLIENT, PORTS["serve"]), ("monitoring", MONITOR, PORTS["metrics"])]
    for who, source, port in inward:
        if not allowed(site, source, pod, port):
            yield f"the network rules let {who} not reach it (port {port})"
    for who, source in (("strangers", STRANGER), ("clients", CLIENT), ("monitoring", MONITOR)):
        if allowed(site, source, pod, PORTS["dashboard"]):
            yield f"the network rules let {who} reach the dashboard (port {PORTS['dashboard']})"


def allowed(site: Sequence[Object], source: End, to: End, port: int, protocol: str = "TCP") -> bool:
    """Whether the network rules let a connection through, at both of its ends. Ends elsewhere are not ours to rule."""
    return all(
        _is_let(site, here, there, direction, port, protocol)
        for here, there, direction in ((source, to, "Egress"), (to, source, "Ingress"))
        if here.namespace is None and here.address is None
    )


def _is_let(site: Sequence[Object], here: End, there: End, direction: str, port: int, protocol: str) -> bool:
    specs = [found["spec"] for found in site if found["kind"] == "NetworkPolicy"]
    about = [spec for spec in specs if direction in spec["policyTypes"] and _matches(spec["podSelector"], here.labels)]
    rules = [rule for spec in about for rule in spec.get(direction.lower(), [])]
    return not about or any(
        _has_peer(rule.get("to" if direction == "Egress" else "from"), there) and _has_port(rule.get("ports"), port, protocol)
        for rule in rules
    )


def _has_port(ports: Sequence[Object] | None, port: int, protocol: str) -> bool:
    return not ports or any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports)


def _has_peer(peers: Sequence[Object] | None, there: End) -> bool:
    return not peers or any(_is_peer(peer, there) for peer in peers)


def _is_peer(peer: Object, there: End) -> bool:
    if block := peer.get("ipBlock"):
        return there.address is not None and _is_in(there.address, block)
    if there.address is not None:
        return False
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], there.namespace or {}):
            return False
    elif there.namespace is not None:
        return False
    return _matches(peer.get("podSelector", {}), there.labels)


def _is_in(address: str, block: Object) -> bool:
    found = ip_address(address)
    return found in ip_network(block["cidr"]) and not any(found in ip_network(net) for net in block.get("except", []))


def _matches(selector: Object, labels: Mapping[str, Any]) -> bool:
    if unknown := selector.keys() - {"matchLabels"}:
        raise ValueError(f"a selector by {', '.join(unknown)} is not known to scripts/manifests/site.py")
    return selector.get("matchLabels", {}).items() <= labels.items()

"""The namespace that the overlays are applied to has what they need, and its network rules let through what must pass alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest

from scripts.manifests.__main__ import OVERLAYS, check_sites
from scripts.manifests.kustomize import render
from scripts.manifests.rules import QUEUE
from scripts.manifests.site import check_site

JOB = {"train-one-gpu": render(OVERLAYS / "train-one-gpu")}


@cache
def _site() -> list[Any]:
    return [found for name in ("setup", "setup-queue") for found in render(OVERLAYS / name)]


def _changed(name: str, path: str, value: Any) -> list[Any]:
    """The site with one value of an object changed, or removed (None)."""
    site = copy.deepcopy(_site())
    *parents, last = (key.replace("~", "/") for key in path.split("/"))
    node: Any = next(found for found in site if found["metadata"]["name"] == name)
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    place: Any = int(last) if isinstance(node, list) else last
    if value is None:
        del node[place]
    else:
        node[place] = value
    return site


def test_every_overlay_finds_what_it_needs():
    assert check_sites() == []


@pytest.mark.parametrize(
    ("name", "path", "value", "problem"),
    [
        ("shared", "spec/accessModes", ["ReadWriteOnce"], "must have ReadWriteMany"),
        ("shared", "spec/accessModes", ["ReadWriteAll"], "must be of ReadWriteOnce"),
        ("shared", "spec/resources", {}, "must say its size"),
        ("shared", "metadata/name", "share", "no PersistentVolumeClaim shared"),
        ("training", "metadata/name", "other", "no ClusterQueue training"),
        ("raytune-llm", "metadata/labels/pod-security.kubernetes.io~enforce", "baseline", "must enforce"),
        ("ray-nodes", "spec/podSelector/matchLabels", {"ray.io/is-ray-nod": "yes"}, "let other nodes not reach it"),
        ("ray-nodes", "spec/ingress/0", None, "let other nodes not reach it"),
        ("ray-nodes", "spec/ingress/1/ports/0/port", 8266, "let KubeRay not reach it (port 8265)"),
        ("ray-nodes", "spec/ingress/1/from/0/podSelector/matchLabels", {"a": "b"}, "submitter: the network rules"),
        ("ray-nodes", "spec/ingress/2/ports/0/port", 8001, "let clients not reach it (port 8000)"),
        ("ray-nodes", "spec/ingress/2/ports/0/port", 8265, "let clients reach the dashboard"),
        ("ray-nodes", "spec/ingress/3/ports/0/port", 9090, "let monitoring not reach it (port 8080)"),
        ("ray-nodes", "spec/ingress/0", {}, "let strangers reach the dashboard"),
        ("outward", "spec/egress/0", None, "let it not reach the head"),
        ("outward", "spec/egress/1/ports/0/protocol", "TCP", "let it not reach names"),
        ("outward", "spec/egress/2/ports/0/port", 80, "let it not reach HTTPS outside"),
        ("outward", "spec/egress/2/to/0/ipBlock", {"cidr": "0.0.0.0/0"}, "the cloud's metadata service"),
    ],
)
def test_a_namespace_that_lacks_or_lets_through_something_is_refused(name, path, value, problem):
    problems = list(check_site(_changed(name, path, value), JOB))
    assert any(problem in said for said in problems), problems


def test_a_job_for_a_queue_that_is_not_there_is_refused():
    job = copy.deepcopy(JOB)
    job["train-one-gpu"][0]["metadata"]["labels"][QUEUE] = "other"
    assert "train-one-gpu: there is no LocalQueue other" in check_site(_site(), job)


def test_a_submitter_whose_label_no_rule_knows_is_refused():
    job = copy.deepcopy(JOB)
    del job["train-one-gpu"][0]["spec"]["submitterPodTemplate"]["metadata"]["labels"]["app.kubernetes.io/component"]
    assert "train-one-gpu: submitter: the network rules let it not reach the head (port 8265)" in check_site(_site(), job)

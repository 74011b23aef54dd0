"""Check every overlay of cluster/kuberay: python -m scripts.manifests [--crds FOLDER].

FOLDER has KubeRay's definitions, ray.io_rayjobs.yaml and so on, as its repository has them in ray-operator/config/crd/bases or as
`kubectl get crd rayjobs.ray.io -o yaml` writes them. Without them everything else is checked.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from scripts.manifests.entrypoints import check_entrypoint
from scripts.manifests.kustomize import KustomizeError, Object, render
from scripts.manifests.pods import check_pods
from scripts.manifests.rules import broken_of, check_rules
from scripts.manifests.schemas import check_builtin, check_definition, check_pod
from scripts.manifests.serving import check_serve_config
from scripts.manifests.site import check_site
from scripts.manifests.workloads import cluster_spec, pod_templates

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ROOT / "cluster" / "kuberay" / "overlays"
CRDS = ROOT.parent / "shared" / "kuberay"
UNCHECKED = ("kueue.x-k8s.io/v1beta2",)
"""Kinds whose schema is not at hand."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.manifests", description="Check every overlay of cluster/kuberay.")
    parser.add_argument("--crds", type=Path, default=CRDS if CRDS.is_dir() else None, help="folder of KubeRay's definitions")
    crds = parser.parse_args().crds
    overlays = sorted(folder for folder in OVERLAYS.iterdir() if folder.is_dir())
    broken = [f"{folder.name}: {problem}" for folder in overlays for problem in check_overlay(folder, crds)]
    broken += check_sites() if not broken else []
    for problem in broken:
        print(problem, file=sys.stderr)
    without = [] if crds else ["KubeRay's definitions (give their folder with --crds)"]
    without += [] if shutil.which("kubectl") else ["kubectl, which renders them itself"]
    print(f"{len(overlays)} overlays, {len(broken)} problems" + "".join(f"; checked without {what}" for what in without))
    return bool(broken)


def check_overlay(folder: Path, crds: Path | None) -> list[str]:
    """All that is wrong with an overlay; crds is the folder of KubeRay's definitions, none to go without."""
    try:
        objects = render(folder)
    except KustomizeError as error:
        return [str(error)]
    return _as_kubectl(folder, objects) + [problem for found in objects for problem in check_object(found, crds)]


def check_sites() -> list[str]:
    """What is wrong between the overlays and the namespace that they are applied to."""
    sites = {"setup": ("setup", "setup-queue"), "setup-kind": ("setup-kind",)}
    others = [folder.name for folder in sorted(OVERLAYS.iterdir()) if not folder.name.startswith("setup")]
    problems = []
    for site, folders in sites.items():
        objects = [found for name in folders for found in render(OVERLAYS / name)]
        here = {name: render(OVERLAYS / name) for name in others if name.endswith("-kind") == site.endswith("-kind")}
        problems += [f"{site}: {problem}" for problem in check_site(objects, here)]
    return problems


def check_object(found: Object, crds: Path | None) -> list[str]:
    if found["apiVersion"] in UNCHECKED:
        return []
    if found["apiVersion"] != "ray.io/v1":
        return check_builtin(found) + broken_of(check_pods, found)
    problems = check_definition(found, crds) if crds else []
    problems += check_rules(found) + _version(found)
    problems += [f"{where}: {problem}" for where, template in pod_templates(found) for problem in check_pod(template)]
    return problems + broken_of(check_entrypoint, found) + broken_of(check_serve_config, found)


def _version(found: Object) -> list[str]:
    """The operator acts by the version that the manifest says; the image has the one of constraints.txt."""
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    said = (cluster_spec(found) or {}).get("rayVersion")
    return [] if pinned == f"ray=={said}" else [f"rayVersion must be that of constraints.txt, {pinned}, got {said}"]


def _as_kubectl(folder: Path, objects: list[Object]) -> list[str]:
    """Where kubectl is installed, it must render the same."""
    if not shutil.which("kubectl"):
        return []
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        return [f"kubectl kustomize: {done.stderr.strip()}"]
    theirs = {_key(found): found for found in yaml.load_all(done.stdout, yaml.CSafeLoader)}
    ours = {_key(found): found for found in objects}
    return [f"kubectl renders {key} differently" for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)]


def _key(found: Object) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


if __name__ == "__main__":
    sys.exit(main())

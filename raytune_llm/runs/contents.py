"""What a model's and an adapter's files hold, as far as answers depend on it: answers of other files are not resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from transformers.utils.hub import cached_file

from raytune_llm import packaged
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.tokens.tokenizer import BYTES
from raytune_llm.file_hash import sha256_of
from raytune_llm.models.adapters.saved import CONFIG, WEIGHTS
from raytune_llm.models.finished import FINAL, FINISHED

READ = (".json", ".jinja", ".model", ".txt", ".py")
"""Suffixes of what is read beside weights: config, generation config, tokenizer, chat template, code."""
NOT_READ = (
    "export.json", "training_args.json", "trainer_state.json", FINISHED, "summary.json", "predict.json", "metrics.json",
    "predict_results.json", "results.json",
)  # fmt: skip
"""What training, exports, predictions and evaluations write into a folder, which may be the model's own."""
HEAVY = (".safetensors", ".bin")


def model_contents(model: ModelConfig) -> dict[str, object]:
    """Of the base, of a tokenizer of its own, and of the adapters that are merged into it."""
    return {
        "config": dict(model.config),
        "model": model.path and _contents(model.path, model.revision),
        "tokenizer": model.tokenizer and _contents(model.tokenizer, None),
        "merged adapters": [adapter_contents(folder) for folder in model.merged_adapters],
    }


def adapter_contents(folder: str) -> str:
    """SHA-256 of an adapter's config and weights, in hex."""
    digest = hashlib.sha256()
    for name in (CONFIG, *WEIGHTS):
        if (Path(folder) / name).is_file():
            digest.update(bytes.fromhex(sha256_of(Path(folder) / name)))
    return digest.hexdigest()


def _contents(path: str, revision: str | None) -> str:
    """Of a hub's model: its commit."""
    if path == BYTES:
        return path  # a tokenizer that is built in
    folder = Path(packaged.resolve(path))
    if not folder.is_dir():
        return _commit(path, revision) or path
    return folder_contents(folder)


def folder_contents(folder: Path) -> str:
    """SHA-256 over its files. Of weights, the hashes that a finished run noted are taken, or else sizes and times of change:
    reading a large model takes minutes."""
    noted, found = _noted(folder), {}
    for file in sorted(folder.iterdir()):
        if file.suffix in HEAVY:
            there = file.stat()
            found[file.name] = noted.get(f"{FINAL}/{file.name}") or f"{there.st_size} bytes of {there.st_mtime_ns}"
        elif file.suffix in READ and file.name not in NOT_READ and file.is_file():
            found[file.name] = sha256_of(file)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _commit(name: str, revision: str | None) -> str | None:
    """Of what lies in the hub's cache."""
    for file in ("config.json", "tokenizer_config.json"):
        with suppress(OSError):
            found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                return Path(found).parent.name
    return None


def _noted(folder: Path) -> Mapping[str, str]:
    """The hashes of a run's final/, as the run that finished there wrote them."""
    try:
        return dict(json.loads((folder.parent / FINISHED).read_text())["files"]) if folder.name == FINAL else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}

"""Hashes of a model's and an adapter's files. predict and evaluate resume only if answers come from the same files."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from transformers.utils.hub import cached_file

from raytune_llm import packaged
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.tokens.tokenizer import BYTES
from raytune_llm.file_hash import sha256_of
from raytune_llm.finished import FINAL, FINISHED, files_of
from raytune_llm.models.adapters.saved import CONFIG, WEIGHTS

READ = (".json", ".jinja", ".model", ".txt", ".py")
"""Suffixes of files that are hashed in addition to weights: configs, tokenizer, chat template, code."""
NOT_READ = (
    "export.json", "training_args.json", "trainer_state.json", FINISHED, "summary.json", "predict.json", "metrics.json",
    "predict_results.json", "results.json",
)  # fmt: skip
"""Files that training, exports, predictions and evaluations write; the model's folder may contain them."""
HEAVY = (".safetensors", ".bin")


def model_contents(model: ModelConfig) -> dict[str, object]:
    """Hashes of the base, of a separate tokenizer, and of the adapters that are merged into the base."""
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
    """A hash of a model's files, or its commit if it is a hub's."""
    if path == BYTES:
        return path  # the built-in tokenizer
    folder = Path(packaged.resolve(path))
    if not folder.is_dir():
        return _commit(path, revision) or path
    return folder_contents(folder)


def folder_contents(folder: Path) -> str:
    """SHA-256 over a folder's files. For weights, it uses the hashes that a finished run noted, or else sizes and modification
    times, since reading a large model takes minutes."""
    noted, found = files_of(folder.parent) if folder.name == FINAL else {}, {}
    for file in sorted(folder.iterdir()):
        if file.suffix in HEAVY:
            there = file.stat()
            found[file.name] = noted.get(f"{FINAL}/{file.name}") or f"{there.st_size} bytes of {there.st_mtime_ns}"
        elif file.suffix in READ and file.name not in NOT_READ and file.is_file():
            found[file.name] = sha256_of(file)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a model in the hub's cache; None if it is not there."""
    for file in ("config.json", "tokenizer_config.json"):
        with suppress(OSError):
            found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                return Path(found).parent.name
    return None

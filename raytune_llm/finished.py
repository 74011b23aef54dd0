"""Checks whether the files in the `final/` of a finished run are still those that the run wrote."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path

from raytune_llm.errors import ConfigError
from raytune_llm.file_hash import sha256_of

log = logging.getLogger(__name__)
FINISHED, FINAL = "finished.json", "final"
WEIGHTS = (".safetensors", ".bin")


def files_of(output_dir: Path) -> dict[str, str | None]:
    """The hashes of a finished run's files, from its finished.json; empty if that is missing or damaged."""
    try:
        return dict(json.loads((output_dir / FINISHED).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def check_unchanged(folder: Path, setting: str, *, max_bytes: int) -> None:
    """Raises ConfigError if weights in the `final/` of a run differ from the hashes in its finished.json. A changed file of
    another kind gives a warning, since a user may have edited it. Other folders are not checked.

    Files larger than max_bytes are not read, since hashing takes one to two seconds per GiB on one core, much longer than loading
    a large model. Reading their tensors will at least check their length.
    """
    if folder.name != FINAL:
        return
    for name, digest in files_of(folder.parent).items():
        file = folder.parent / name
        if file.parent != folder or _is(file, digest, max_bytes):
            continue
        if file.suffix in WEIGHTS:
            rule = f"must be as the run that finished there wrote it: {file.name} has changed since, or is damaged"
            fix = f"Repeat the run's command, which writes it again; without {folder.parent / FINISHED} it is taken as it is."
            raise ConfigError(setting, rule, got=str(folder), fix=fix)
        log.warning("%s has changed since the run that finished there wrote it", file)


def _is(file: Path, digest: str | None, max_bytes: int) -> bool:
    try:
        there = file.stat()
        return there.st_size > max_bytes or _hash(file, there.st_size, there.st_mtime_ns) == digest
    except OSError:
        return False


@cache
def _hash(file: Path, size: int, changed_ns: int) -> str:
    """The file's hash, cached in this process while the file does not change, since a config is read many times."""
    return sha256_of(file)

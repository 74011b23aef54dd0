"""The `final/` of a finished run, and whether its files still are those that the run wrote."""

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


def check_unchanged(folder: Path, setting: str, *, max_bytes: int) -> None:
    """Raises ConfigError where weights in the `final/` of a run are not as finished.json beside it says. Any other file that has
    changed is said in a warning: a user may have edited it. A folder that is no such `final/` is not looked at.

    Files of more than max_bytes are not read: hashing takes a second or two a GiB on one core, which an adapter and a small model
    take once more to load, and a large model many times over. What reads their tensors checks that they are as long as they say.
    """
    if folder.name != FINAL:
        return
    try:
        wrote = dict(json.loads((folder.parent / FINISHED).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for name, digest in wrote.items():
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
    """Once a process for a file that stays as it is: a config is read by many who need it."""
    return sha256_of(file)

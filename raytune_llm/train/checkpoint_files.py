"""Reads, writes, checks and removes the files of checkpoints in a folder. It does not import torch.

If the file system does not answer, each function except `complete_steps` retries for two minutes (storage.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.errors import DataError
from raytune_llm.file_hash import sha256_of
from raytune_llm.storage import patient
from raytune_llm.train.progress import Progress

log = logging.getLogger(__name__)
COMPLETE = "COMPLETE"
PROGRESS = "progress.json"
METADATA = ".metadata"
"""The index file of torch's format, which rank 0 writes."""
FILES = "files"
"""In progress.json: name -> sha256 of each file of the state."""
STEP = re.compile(r"step-(\d+)")
HASHED_AT_ONCE = 8
"""Files that one process hashes in parallel, so that the disk limits the speed and not one core."""
CONTENT = "sha256"
"""In progress.json: the hash of all other entries, so that a changed byte shows."""
FORMAT_VERSION, UNHASHED = 3, 2
"""Increase the first when the format of progress.json or of the state changes. The second lacks CONTENT, and is read as well."""


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def complete_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. Folders with other names are ignored.

    Raises OSError if the file system fails: a run that took this for "no checkpoint" would start over.
    """
    return sorted(step for step in _steps(folder) if _exists(path_of(folder, step) / COMPLETE))


_complete_steps = patient("can't be read")(complete_steps)


def _steps(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(found[1]) for name in names if (found := STEP.fullmatch(name)) is not None]


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def newest_sound(folder: Path) -> int | None:
    """The newest checkpoint whose files match their hashes; None if there is no checkpoint.

    Logs which newer ones are damaged. Raises DataError if all are.
    """
    return newest_of(str(folder), _complete_steps(folder), partial(damage, folder))


def newest_of(where: str, steps: Sequence[int], problem_of: Callable[[int], str | None]) -> int | None:
    """Like newest_sound, for these steps (ascending). problem_of: gives what is wrong with a checkpoint, None if it is intact."""
    problems: list[str] = []
    for step in reversed(steps):
        problem = problem_of(step)
        if problem is None:
            for known in problems:
                log.warning("checkpoint %s: using step-%d", known, step)
            return step
        problems.append(f"step-{step} can't be used ({problem})")
    if problems:
        what, fix = "; ".join(problems), "Set resume=never to start anew, or choose another output_dir."
        raise DataError(where, f"holds no usable checkpoint: {what}", fix)
    return None


def damage(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint's files; None if they match their hashes."""
    place = path_of(folder, step)
    try:
        values = read_document(place)
    except DataError as error:
        return error.problem

    def problem(name: str, known: str) -> str | None:
        try:
            return None if hash_of(place / "state" / name) == known else f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"

    hashes: dict[str, str] = values[FILES]
    with ThreadPoolExecutor(HASHED_AT_ONCE, thread_name_prefix="hash") as pool:
        return next((found for found in pool.map(problem, hashes, hashes.values()) if found is not None), None)


def read_progress(folder: Path, step: int) -> tuple[Progress, dict[str, str]]:
    """The progress of the run, and the identity that it was saved with."""
    values = read_document(path_of(folder, step))
    names = Progress.__dataclass_fields__
    progress = Progress(**{name: value for name, value in values.items() if name in names})
    return progress, {name: value for name, value in values.items() if name not in names and name != FILES}


def read_document(place: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(place / PROGRESS))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(place / PROGRESS), f"can't be read ({error})", "Delete this checkpoint.") from None
    if not isinstance(values, dict) or values.get("step") != int(place.name.removeprefix("step-")):
        raise DataError(str(place / PROGRESS), "is not the progress of this step", "Delete this checkpoint.")
    content = values.pop(CONTENT, None)
    if (version := values.get("format_version")) not in (FORMAT_VERSION, UNHASHED):
        raise DataError(
            str(place / PROGRESS),
            f"was written by another version of this package, which can finish the run (checkpoint format {version or 1}, not "
            f"{FORMAT_VERSION})",
            "Set resume=never to start anew.",
        )
    if content != (None if version == UNHASHED else _content_hash(values)) or not isinstance(values.get(FILES), dict):
        raise DataError(str(place / PROGRESS), f"{PROGRESS} has other bytes than were written", "Delete this checkpoint.")
    del values["format_version"]
    return values


def _content_hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@patient("can't be read")
def _text(path: Path) -> str:
    return path.read_text()


@patient("can't be read")
def hash_of(path: Path) -> str:
    return sha256_of(path)


def digest(path: Path) -> str | None:
    """The hash of a file, or None if the file can't be read."""
    try:
        return hash_of(path)
    except OSError:
        return None


def sweep(folder: Path) -> None:
    """Remove incomplete checkpoints that a crash left. Folders with other names stay."""
    complete = _complete_steps(folder)
    for step in _steps(folder):
        if step not in complete:
            shutil.rmtree(path_of(folder, step), ignore_errors=True)


@patient("can't be written")
def begin(folder: Path, step: int) -> None:
    """Create an empty folder for a checkpoint; an old one is removed."""
    _remove(folder, step)
    path_of(folder, step).mkdir(parents=True)


@patient("can't be written")
def write_document(folder: Path, step: int, document: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """document: the progress of the run and its identity. hashes: of the files of the state, by name."""
    values = json.loads(json.dumps({"format_version": FORMAT_VERSION, **document, FILES: hashes}))  # as it is read
    write_atomically(path_of(folder, step) / PROGRESS, json.dumps({**values, CONTENT: _content_hash(values)}, indent=1))


@patient("can't be written")
def mark_complete(folder: Path, step: int) -> None:
    """When it returns, the checkpoint is on the disk and not in the system's memory alone: the one before it may be removed next,
    and the power fail after that."""
    place = path_of(folder, step)
    _flush(place / "state")
    (place / COMPLETE).touch()
    _flush(place)
    _flush(folder)


def _flush(folder: Path) -> None:
    """Write the folder's list of names to the disk; torch does it with the files of the state."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not flush folders
            raise
    finally:
        os.close(opened)


def _remove(folder: Path, step: int) -> None:
    """COMPLETE is removed first, so that a crash in between leaves no folder that seems complete."""
    (path_of(folder, step) / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path_of(folder, step), ignore_errors=True)


remove = patient("can't be written")(_remove)

"""Translates the paths in a run's config for the cluster, and rejects those that don't exist there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from raytune_llm.cluster.package import CARRIED, EXAMPLES
from raytune_llm.config.paths import ALWAYS, expanded, with_paths
from raytune_llm.config.run import TrainRun
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.readers.declarations import declared, declared_for_evaluation
from raytune_llm.errors import ConfigError

Run = TypeVar("Run")
ROWS = ("data.path", "data.eval_path")
"""Folders of which each file is read."""
SHARED = "Set {setting}=/shared/..., a folder that all nodes of the cluster see."


def on_cluster(run: Run, folder: Path, files: Mapping[str, Path]) -> Run:
    """The run with paths as the job needs them: relative to its working folder for uploaded files, else unchanged.

    files: the uploaded files, from `package.files_of`; none for a job in an image, which has the package and its examples in a
    folder of its own. Raises ConfigError for a path that the job could not find.
    """
    travelling = _travelling(files)
    places = {folder.resolve(): Path()} | {root.resolve(): Path(place) for place, root in CARRIED.items()}

    def moved(setting: str, value: str) -> str:
        path = expanded(value).resolve()
        place = _place(path, travelling, places)
        if place is not None and setting not in ALWAYS:
            if setting in ROWS:
                _check_whole(setting, path, travelling)
            return place
        if is_carried(value) and not files:
            return _in_image(setting, path, value)
        if Path(value).is_absolute() or not _is_path(setting, value):
            return value
        if setting in ALWAYS:
            raise ConfigError(
                setting,
                "must be an absolute path for a job, whose working folder is deleted with it",
                got=value,
                fix=SHARED.format(setting=setting),
            )
        why = _why_not_sent(value, path, folder) if files else "with submit.image no file is sent"
        raise ConfigError(
            setting,
            f"must be sent with the job or be an absolute path on the cluster: {why}",
            got=value,
            fix=SHARED.format(setting=setting),
        )

    return with_paths(run, moved)


def _travelling(files: Mapping[str, Path]) -> dict[Path, str]:
    """Real path -> path in the job's working folder. A file is found by whatever way a setting names it: over a link, or `..`."""
    return {path.resolve(): name for name, path in files.items()}


def _why_not_sent(value: str, path: Path, folder: Path) -> str:
    if path.exists() and path.is_relative_to(folder.resolve()):
        return "git or submit.ignore leaves it out"
    if path.exists() and Path(os.path.normpath(expanded(value).absolute())).is_relative_to(os.path.normpath(folder.absolute())):
        return "a link leads out of submit.folder, and links to folders are not followed"
    return "it is not in submit.folder"


def check_entries(run: TrainRun, files: Mapping[str, Path]) -> None:
    """Raises ConfigError for files of data.dataset_info that the run reads and that are not sent, where data.dataset_info is."""
    info = run.data.dataset_info
    travelling = _travelling(files)
    if info is None or not any(file.is_relative_to(expanded(info).resolve()) for file in travelling):
        return
    ranked = KINDS[run.stage.kind].ranked
    for one in (*declared(run.data, ranked=ranked), *declared_for_evaluation(run.data, ranked=ranked)):
        path = Path(one.path)
        if path.is_absolute() and path.exists():
            _check_whole(one.setting, path, travelling)


def _check_whole(setting: str, path: Path, travelling: Mapping[Path, str]) -> None:
    """Raises ConfigError where rows would be missing in the job without a word."""
    there = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    seen = [file for file in there if not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)]
    if left := [file for file in seen if file.resolve() not in travelling]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ConfigError(
            setting,
            f"must be sent whole: {left[0]}{more} would not be, because of git, submit.ignore or submit.folder",
            got=str(path),
            fix="Name the files that are meant, or put them on storage that all nodes of the cluster see.",
        )


def place_of(flag: str, path: Path, folder: Path, files: Mapping[str, Path]) -> str:
    """A folder's path in the job's working folder. Raises ConfigError, which names the flag, where none of its files is sent."""
    place = _place(path.resolve(), _travelling(files), {folder.resolve(): Path()})
    if place is None:
        raise ConfigError(flag, "must be a folder of submit.folder, which is sent with the job", got=str(path))
    return place


def is_carried(value: object) -> bool:
    """Whether a path is one of the package's own files."""
    return isinstance(value, str) and any(expanded(value).resolve().is_relative_to(root.resolve()) for root in CARRIED.values())


def _in_image(setting: str, path: Path, value: str) -> str:
    """As a word of YAML, which the job's package resolves."""
    if path.is_relative_to(EXAMPLES.resolve()):
        return f"${{examples:{path.relative_to(EXAMPLES.resolve()).as_posix()}}}"
    rule = "must be an absolute path in the image: with submit.image no file is sent, and this one is in the package here"
    raise ConfigError(setting, rule, got=value)


def _place(path: Path, travelling: Mapping[Path, str], places: Mapping[Path, Path]) -> str | None:
    """The path in the job's working folder, of an uploaded file or of a folder with uploaded files. None: it is neither."""
    if path in travelling:
        return travelling[path]
    if not any(file.is_relative_to(path) for file in travelling):
        return None
    return next((str(place / path.relative_to(root)) for root, place in places.items() if path.is_relative_to(root)), None)


def _is_path(setting: str, value: str) -> bool:
    """Whether the value can only be a path, not the name of a model or data set on a hub."""
    if setting in ALWAYS or value.startswith((".", "~")) or os.path.lexists(value):
        return True
    return value.count("/") > 1 or re.search(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|ya?ml)$", value) is not None

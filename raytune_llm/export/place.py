"""Where an export goes: a folder that is not there, an empty one, or the place of an earlier export."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from raytune_llm.errors import ConfigError
from raytune_llm.export.source import Source
from raytune_llm.runs.owner import check_writable

EXPORTED = "export.json"
"""The figures of the card. A folder with it is an export."""
MADE_FROM, WEIGHTS, OTHERS = "made_from", "weights", "files"
"""In it: all that the export depends on, the sizes of its weights by name, and the names of its other files."""
MOUNTS = Path("/proc/self/mountinfo")


def place_of(output_dir: str, *, overwrite: bool) -> Path:
    """The folder that is written, links followed. Raises ConfigError where an export can't go."""
    try:
        place = Path(output_dir).resolve()
        check_writable(place.parent)
        if place.exists():
            _check_there(place, overwrite=overwrite)
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise _refused(f"must be a folder that can be written ({error})", output_dir) from None
    except ConfigError as error:
        raise _refused(error.rule, output_dir, error.fix) from None
    return place


def _check_there(place: Path, *, overwrite: bool) -> None:
    if not place.is_dir():
        raise _refused("must be a folder", str(place))
    if _is_mounted(place):
        rule = "must be no mount point: the folder is replaced as a whole, when the export is"
        raise _refused(rule, str(place), f"Name a folder in it: export.output_dir={place}/model.")
    if any(place.iterdir()):
        is_export = (place / EXPORTED).is_file()
        if not is_export:
            rule = f"must be empty or not there, or an earlier export, with its {EXPORTED}"
            raise _refused(rule, str(place))
        if not overwrite:
            fix = "Choose another one, or set export.overwrite=true."
            raise _refused("must be empty, or not there", str(place), fix)


def made_from(place: Path) -> dict[str, Any]:
    """What the export there was made from, as its EXPORTED says; empty where none is there."""
    try:
        return dict(json.loads((place / EXPORTED).read_text())[MADE_FROM])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def is_whole(place: Path) -> bool:
    """Whether all files are there that its EXPORTED names, weights in their sizes. Others may have been edited."""
    try:
        wrote = json.loads((place / EXPORTED).read_text())
        weights, others = dict(wrote.get(WEIGHTS, {})), list(wrote.get(OTHERS, ()))
        has_weights = all((place / name).stat().st_size == size for name, size in weights.items())
        return has_weights and all((place / name).is_file() for name in others)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def check_apart(place: Path, source: Source) -> None:
    """Raises ConfigError where what is exported lies in the place that the export takes."""
    adapters = [*source.under, *(adapter for adapter, _ in source.adapters)]
    for used in filter(None, (source.folder, source.beside, *(Path(adapter.folder) for adapter in adapters))):
        if used.resolve().is_relative_to(place):
            raise _refused(f"must not hold what is exported ({used})", str(place))


def _refused(rule: str, got: str, fix: str = "Choose another one.") -> ConfigError:
    return ConfigError("export.output_dir", rule, got=got, fix=fix)


def _is_mounted(place: Path) -> bool:
    """Also where the same disk is mounted again, which its number doesn't tell."""
    if os.path.ismount(place):
        return True
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    points = (line.split(" ")[4] for line in lines)
    return str(place) in {point.replace("\\040", " ").replace("\\134", "\\") for point in points}

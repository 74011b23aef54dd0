"""The folder of an export: a new or empty one, or that of an earlier export."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from raytune_llm.errors import ConfigError
from raytune_llm.export.source import Source
from raytune_llm.runs.owner import check_writable

EXPORTED = "export.json"
"""The file with the card's figures, by which an export is recognized."""
MADE_FROM, WEIGHTS, OTHERS = "made_from", "weights", "files"
"""Its keys: everything on which the export depends, the sizes of its weight files by name, and the names of its other files."""
MOUNTS = Path("/proc/self/mountinfo")


def place_of(output_dir: str, *, overwrite: bool) -> Path:
    """The folder to write, with links resolved. Raises ConfigError if an export can't be written there."""
    try:
        place = Path(output_dir).resolve()
        check_writable(place.parent)
        if place.exists():
            _check_there(place, overwrite=overwrite)
    except (OSError, RuntimeError) as error:  # RuntimeError: a cycle of links
        raise _refused(f"must be a folder that can be written ({error})", output_dir) from None
    except ConfigError as error:
        raise _refused(error.rule, output_dir, error.fix) from None
    return place


def _check_there(place: Path, *, overwrite: bool) -> None:
    if not place.is_dir():
        raise _refused("must be a folder", str(place))
    if _is_mounted(place):
        rule = "must not be a mount point, since the folder is replaced as a whole"
        raise _refused(rule, str(place), f"Name a folder in it: export.output_dir={place}/model.")
    if any(place.iterdir()):
        is_export = (place / EXPORTED).is_file()
        if not is_export:
            rule = f"must be empty, new, or an earlier export with its {EXPORTED}"
            raise _refused(rule, str(place))
        if not overwrite:
            fix = "Choose another one, or set export.overwrite=true."
            raise _refused("must be empty or new", str(place), fix)


def made_from(place: Path) -> dict[str, Any]:
    """What the existing export was made from, according to its EXPORTED; empty if there is none."""
    try:
        return dict(json.loads((place / EXPORTED).read_text())[MADE_FROM])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def is_whole(place: Path) -> bool:
    """Whether all files that its EXPORTED names exist, weights with their sizes. Other files may have been edited."""
    try:
        wrote = json.loads((place / EXPORTED).read_text())
        weights, others = dict(wrote.get(WEIGHTS, {})), list(wrote.get(OTHERS, ()))
        has_weights = all((place / name).stat().st_size == size for name, size in weights.items())
        return has_weights and all((place / name).is_file() for name in others)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def check_apart(place: Path, source: Source) -> None:
    """Raises ConfigError if the export's folder contains what is exported."""
    adapters = [*source.under, *(adapter for adapter, _ in source.adapters)]
    for used in filter(None, (source.folder, source.beside, *(Path(adapter.folder) for adapter in adapters))):
        if used.resolve().is_relative_to(place):
            raise _refused(f"must not hold what is exported ({used})", str(place))


def _refused(rule: str, got: str, fix: str = "Choose another one.") -> ConfigError:
    return ConfigError("export.output_dir", rule, got=got, fix=fix)


def _is_mounted(place: Path) -> bool:
    """Whether the folder is a mount point, including bind mounts of the same disk, which st_dev does not show."""
    if os.path.ismount(place):
        return True
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    points = (line.split(" ")[4] for line in lines)
    return str(place) in {point.replace("\\040", " ").replace("\\134", "\\") for point in points}

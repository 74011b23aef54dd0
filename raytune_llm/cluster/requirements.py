"""The packages, with versions, that Ray installs on the nodes of a job."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from raytune_llm.errors import ConfigError

OURS = "raytune-llm"


def requirements(what: str) -> list[str]:
    """Requirements for `pinned` or from a file. Raises ConfigError if the file can't be read."""
    if what == "pinned":
        return pinned()
    try:
        lines = [line.strip() for line in Path(what).read_text().splitlines()]
    except OSError as error:
        raise ConfigError(
            "submit.requirements", f"must be pinned or a file that can be read ({error.strerror})", got=what
        ) from None
    return [line for line in lines if line and not line.startswith("#")]


def pinned() -> list[str]:
    """All dependencies of this package in the versions installed here, except Ray and its dependencies, which the cluster has.
    Local version labels such as +cpu are removed, so that each node installs the build that it needs."""
    found: dict[str, str] = {}
    waiting = [OURS]
    while waiting:
        for text in requires(waiting.pop()) or ():
            needed = Requirement(text)
            name = canonicalize_name(needed.name)
            if name in found or name == "ray" or (needed.marker is not None and not needed.marker.evaluate({"extra": ""})):
                continue
            try:
                found[name] = version(name).partition("+")[0]
            except PackageNotFoundError:
                continue  # for another platform
            waiting.append(name)
    return [f"{name}=={found[name]}" for name in sorted(found)]

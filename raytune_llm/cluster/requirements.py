"""The packages, with versions, that Ray installs on the nodes of a job."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from raytune_llm.errors import ConfigError, first_line

OURS = "raytune-llm"


def requirements(what: str) -> list[str]:
    """Requirements for `pinned` or from a file. Raises ConfigError if the file can't be read, or if the nodes could not install
    a line of it."""
    if what == "pinned":
        return pinned()
    try:
        text = Path(what).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not in UTF-8"
        raise ConfigError("submit.requirements", f"must be pinned or a file that can be read ({why})", got=what) from None
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    for line in filter(None, lines):
        _check(line)
    return [line for line in lines if line]


def _check(line: str) -> None:
    """Raises ConfigError for a line that is no requirement, or that names a file of this machine."""
    setting = "submit.requirements"
    if re.match(r"-[rce]|--(requirement|constraint|editable)\b|\.{0,2}/|file:", line):
        rule = "must have no lines that name other files, which the nodes don't have"
        raise ConfigError(setting, rule, got=line, fix="Write the packages themselves.")
    if line.startswith("-"):
        return  # an option of pip
    try:
        Requirement(re.split(r"\s--", line)[0])
    except InvalidRequirement as error:
        raise ConfigError(setting, f"must have lines that pip can read ({first_line(error)})", got=line) from None


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

"""Lists the options of each config group, and the experiments that only one verb can run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raytune_llm.config.overrides import CONF

MAX_LISTED_OPTIONS = 60
"""A list with more options than this is shortened."""


@dataclass(frozen=True)
class OfVerb:
    """Experiments that only one verb can run."""

    section: str
    """The section that marks these experiments."""
    what: str
    varies_runs: bool
    """The verb also takes experiments of train."""


OF_VERBS = {"tune": OfVerb("tune", "sweep", True), "chain": OfVerb("steps", "chain of commands", False)}


def groups() -> list[str]:
    """The config groups: model, data, ..., experiment."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def options(group: str, config_dir: str | Path | None = None) -> list[str]:
    """The options of a group, as they are written after `group=`."""
    folders = [CONF / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({file.stem for folder in folders for file in folder.glob("[!_]*.yaml")})


def listed(found: Sequence[str], separator: str = " ") -> str:
    """A group's options as text. Of a long list, the first ones and where to find the rest."""
    if len(found) <= MAX_LISTED_OPTIONS:
        return separator.join(found) or "none"
    return f"{separator.join(found[:: len(found) // 8])}, and others ({len(found)} in all, in docs/models.md)"


def of_verbs(config_dir: str | Path | None = None) -> dict[str, str]:
    """Experiment -> the only verb that can run it. Experiments of `train` are not included."""
    folders = [CONF / "experiment", *([Path(config_dir) / "experiment"] if config_dir else [])]
    files = [file for folder in folders for file in folder.glob("[!_]*.yaml")]
    texts = {file.stem: file.read_text(encoding="utf-8", errors="replace") for file in sorted(files)}
    return {
        name: verb
        for name, text in texts.items()
        for verb, special in OF_VERBS.items()
        if re.search(rf"^{special.section}:", text, re.M)
    }


def sweeps(config_dir: str | Path | None = None) -> list[str]:
    """The experiments of the verb tune."""
    return sorted(name for name, verb in of_verbs(config_dir).items() if verb == "tune")

"""Which folders may become adapters, and under which names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from raytune_llm.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
"""Nothing that a path, a header or a log line could take for something else."""


def checked_name(name: str, base_name: str) -> str:
    if not NAME.fullmatch(name) or ".." in name:
        rule = "must begin with a letter or a digit and be of letters, digits, dots, hyphens, underscores and @, at most 128"
        raise ConfigError("an adapter's name", rule, got=name[:200])
    if name == base_name:
        fix = "Choose another one, or set serve.base_name."
        raise ConfigError("an adapter's name", "must not be the base's", got=name, fix=fix)
    return name


def checked_folder(folder: str, roots: Sequence[Path]) -> Path:
    """The folder's real place, which is inside an allowed root whatever links lead there."""
    try:
        real = Path(folder).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise ConfigError("an adapter's folder", "must be there", got=folder[:500]) from None
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise ConfigError(
            "an adapter's folder",
            "must be in a folder that adapters may come from",
            got=folder[:500],
            fix="They are serve.watch, serve.adapter_roots, and the folders of serve.adapters.",
        )
    for file in real.iterdir():
        if not file.resolve().is_relative_to(real):
            rule = f"must hold no link that leads out of it, as {file.name} does"
            raise ConfigError("an adapter's folder", rule, got=folder[:500])
    return real

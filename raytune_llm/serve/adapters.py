"""Checks of the names and folders of adapters that are to be served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from raytune_llm.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
"""Characters that are safe in a path, a header and a log line."""


def checked_name(name: str, base_name: str) -> str:
    """Returns the name. Raises ConfigError if it doesn't match NAME or is the base model's."""
    """Returns the name. Raises ConfigError if it doesn't match NAME or is the base model's."""
    if not NAME.fullmatch(name) or ".." in name:
        rule = "must start with a letter or a digit and have at most 128 letters, digits, dots, hyphens, underscores and @"
        raise ConfigError("an adapter's name", rule, got=name[:200])
    if name == base_name:
        fix = "Choose another one, or set serve.base_name."
        raise ConfigError("an adapter's name", "must not be the base's", got=name, fix=fix)
    return name


def checked_folder(folder: str, roots: Sequence[Path]) -> Path:
    """Returns the folder with symbolic links resolved. Raises ConfigError unless all its files are in one of `roots`."""
    try:
        real = Path(folder).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise ConfigError("an adapter's folder", "must exist", got=folder[:500]) from None
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise ConfigError(
            "an adapter's folder",
            "must be inside a folder that adapters may be loaded from",
            got=folder[:500],
            fix="Those are serve.watch, serve.adapter_roots and the folders in serve.adapters.",
        )
    for file in real.iterdir():
        if not file.resolve().is_relative_to(real):
            rule = f"must have no symbolic link that leads outside of it, as {file.name} does"
            raise ConfigError("an adapter's folder", rule, got=folder[:500])
    return real

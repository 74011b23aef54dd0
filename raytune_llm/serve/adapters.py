"""Checks of the names and folders of adapters that are to be served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raytune_llm.config.serve import NAME_RULE, is_adapter_name
from raytune_llm.errors import ConfigError


class MissingFolder(ConfigError):
    """There is no such folder where adapters may be loaded from."""


def checked_name(name: str, base_name: str) -> str:
    """Returns the name. Raises ConfigError if it can't be an adapter's, or is the base model's."""
    if not is_adapter_name(name):
        raise ConfigError("an adapter's name", f"must {NAME_RULE}", got=name[:200])
    if name == base_name:
        fix = "Choose another one, or set serve.base_name."
        raise ConfigError("an adapter's name", "must not be the base's", got=name, fix=fix)
    return name


def checked_folder(folder: str, roots: Sequence[Path]) -> Path:
    """Returns the folder with symbolic links resolved. Raises ConfigError unless all its files are in one of `roots`; outside
    of them, nothing is told of what exists."""
    try:
        real = Path(folder).resolve()
        exists = real.exists()
    except (OSError, RuntimeError, ValueError):  # a circle of links, a name that is too long or holds a null
        raise ConfigError("an adapter's folder", "must be a path that can be read", got=folder[:500]) from None
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise ConfigError(
            "an adapter's folder",
            "must be inside a folder that adapters may be loaded from",
            got=folder[:500],
            fix="Those are serve.watch, serve.adapter_roots and the folders in serve.adapters.",
        )
    if not exists:
        raise MissingFolder("an adapter's folder", "must exist", got=folder[:500])
    try:
        files = list(real.iterdir())
        leads_out = [file.name for file in files if not file.resolve().is_relative_to(real)]
        others = [file.name for file in files if not (file.is_file() or file.is_dir())]
    except (OSError, RuntimeError) as error:  # a file in place of a folder, one that can't be read, a circle of links
        rule = f"must be a folder that can be read ({error.strerror if isinstance(error, OSError) else error})"
        raise ConfigError("an adapter's folder", rule, got=folder[:500]) from None
    if leads_out:
        rule = f"must have no symbolic link that leads outside of it, as {min(leads_out)} does"
        raise ConfigError("an adapter's folder", rule, got=folder[:500])
    if others:  # reading a pipe waits without end
        raise ConfigError("an adapter's folder", f"must hold files alone, and {min(others)} is none", got=folder[:500])
    return real

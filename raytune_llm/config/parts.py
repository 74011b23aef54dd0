"""Describes a run by its differences from the verb's defaults: short, editable, and valid in later versions with new settings."""

from __future__ import annotations

from typing import Any

from raytune_llm.config.load import load_config, validate
from raytune_llm.config.options import groups
from raytune_llm.config.override_syntax import quoted
from raytune_llm.config.plain import as_plain
from raytune_llm.config.run import RUNS
from raytune_llm.errors import ConfigError


def parts_of(verb: str, run: Any) -> dict[str, Any]:
    """The chosen options and the values that differ from the defaults. `run_of` is the inverse."""
    plain = as_plain(run)
    base = _base(verb, plain)
    found = _differing(plain, base)
    for group in groups():
        if isinstance(plain.get(group), dict) and plain[group].get("name") is not None:
            found[group] = {"name": plain[group]["name"], **found.get(group, {})}
    return found


def run_of(verb: str, parts: dict[str, Any]) -> Any:
    """The run from its parts. Raises ConfigError, also for an unknown setting."""
    if not isinstance(parts, dict):
        raise ConfigError("args", "must be an object of settings", got=parts)
    return validate(RUNS[verb], _merged(_base(verb, parts), parts))


def _base(verb: str, parts: dict[str, Any]) -> dict[str, Any]:
    """The verb's defaults with the options that the parts name. The model has no name, so it has the defaults of all models."""
    chosen = [f"{group}={quoted(str(parts[group]['name']))}" for group in groups() if _named(parts.get(group))]
    return as_plain(load_config(verb, [*chosen, "model=hub", "model.path=none"]))


def _named(part: Any) -> bool:
    return isinstance(part, dict) and "name" in part


def _differing(plain: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in plain.items():
        before = base.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := _differing(value, before):
                found[key] = inner
        elif key not in base or value != before:
            found[key] = value
    return found


def _merged(base: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in parts.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged

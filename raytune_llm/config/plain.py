"""Converts a run to plain values and to YAML, and reads YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytune_llm.config.section import validator_of
from raytune_llm.errors import NOT_YAML, ConfigError, first_line


def as_plain(run: Any) -> dict[str, Any]:
    """A run as dicts, lists and plain values."""
    return validator_of(type(run)).dump_python(run, mode="json")


def to_yaml(run: Any) -> str:
    """The whole run as YAML that `--config-dir FOLDER --config-name NAME` composes back into the same run."""
    return OmegaConf.to_yaml(OmegaConf.create(as_plain(run)))


def to_yaml_text(values: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(values))


def read_yaml(path: Path, *, setting: str) -> dict[str, Any]:
    """The mapping in a YAML file; 1e-4 is read as a number. Raises ConfigError that names `setting`, which holds the path."""
    try:
        read = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ConfigError(setting, f"must be a YAML file that can be read ({error.strerror})", got=str(path)) from None
    except (OmegaConfBaseException, *NOT_YAML) as error:
        raise ConfigError(setting, f"must be a YAML file: {first_line(error)}", got=str(path)) from None
    if not isinstance(read, dict):
        raise ConfigError(setting, "must be a YAML file with key: value lines", got=str(path))
    return {str(key): value for key, value in read.items()}


def typed_object(text: str) -> dict[Any, Any] | None:
    """The object {key: value} that a user typed as the value of a setting; None for a text that does not begin with a brace.
    Raises one of NOT_YAML for other texts in braces."""
    return yaml.safe_load(text) if text.startswith("{") else None


def flat_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as (dotted path, value)."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all settings and sections."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flat_keys(value, f"{prefix}{key}.")


def as_text(value: Any) -> str:
    """The value as it is written in YAML and on the command line: null, true, [a,b], {a: 1}."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {as_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_text, value))}]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)

"""Changes settings of a run with overrides as on the command line. It does not import Hydra, so that workers can use it too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from raytune_llm.config.section import validator_of
from raytune_llm.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""conf/ is in the package in an installed wheel, and beside it in a checkout."""

Run = TypeVar("Run")


def changed(run: Run, overrides: Sequence[str]) -> Run:
    """The run with overrides applied: `group=option`, for options that don't build on others, and `group.setting=value`.

    Raises ConfigError if a rule between sections is broken, and pydantic's ValidationError if a rule of one section is.
    """
    kind = validator_of(type(run))
    values = kind.dump_python(run, mode="json")
    seen: set[str] = set()
    for override in overrides:
        path, _, value = override.partition("=")
        if path in seen:
            raise ConfigError(path, "was chosen twice", fix="Choose it once.")
        seen.add(path)
        group, _, setting = path.partition(".")
        if setting:
            values[group] = {**values[group], setting: yaml.safe_load(value)}
        else:
            values[group] = _option(group, value)
    return kind.validate_json(json.dumps(values))  # from JSON, since strict validation accepts its lists for tuples


@cache
def _option(group: str, name: str) -> dict[str, Any]:
    option = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    assert "defaults" not in option, f"{group}={name} is composed of others"
    return option

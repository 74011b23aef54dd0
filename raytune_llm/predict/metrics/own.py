"""A metric of the user's."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune_llm.config.paths import expanded
from raytune_llm.errors import ConfigError


def own_metric(name: str) -> Callable[..., Mapping[str, float | str]]:
    """`FILE.py:NAME` or `package.module:NAME`. Raises ConfigError where it can't be had."""
    place, _, attribute = name.rpartition(":")
    try:
        module = _from_file(expanded(place)) if place.endswith(".py") else importlib.import_module(place)
        function = getattr(module, attribute)
    except (ImportError, OSError, AttributeError, SyntaxError, ValueError) as error:
        rule = f"must name a function that can be imported ({type(error).__name__}: {error})"
        raise ConfigError("predict.metrics", rule, got=name) from None
    if not callable(function):
        raise ConfigError("predict.metrics", "must name a function", got=name)

    def metric(answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float | str]:
        given: Any = function(list(answers), list(references), list(rows))
        return given if isinstance(given, Mapping) else {attribute: float(given)}

    return metric


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"raytune_llm_metric_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Metrics that the user defines."""

from __future__ import annotations

import importlib
import importlib.util
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune_llm.config.paths import expanded
from raytune_llm.errors import ConfigError


def own_metric(name: str) -> Callable[..., Mapping[str, float | str]]:
    """The function `FILE.py:NAME` or `package.module:NAME`. Raises ConfigError if it can't be imported."""
    place, _, attribute = name.rpartition(":")
    try:
        module = _from_file(expanded(place)) if place.endswith(".py") else importlib.import_module(place)
        function = getattr(module, attribute)
    except (Exception, SystemExit) as error:  # a file of the user's may raise anything, and a script may end the process
        rule = f"must name a function that can be imported ({type(error).__name__}: {error})"
        raise ConfigError("predict.metrics", rule, got=name) from None
    if not callable(function):
        raise ConfigError("predict.metrics", "must name a function", got=name)

    def metric(answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float | str]:
        try:
            given: Any = function(list(answers), list(references), list(rows))
        except (Exception, SystemExit) as error:
            raise _unfit(name, f"{type(error).__name__}: {error}, {_place(error)}") from None
        numbers = given if isinstance(given, Mapping) else {attribute: given}
        for what, value in numbers.items():
            if not isinstance(what, str):
                raise _unfit(name, f"a name is {what!r}")
            if not isinstance(value, str) and not _is_number(value):
                raise _unfit(name, f"{what} is {value!r}")
        return {what: value if isinstance(value, str | int) else float(value) for what, value in numbers.items()}

    return metric


def _unfit(name: str, why: str) -> ConfigError:
    fix = "Correct it and type the same command again: the answers are kept."
    return ConfigError(
        "predict.metrics", f"must name a function that gives a number, or numbers and texts by name ({why})", got=name, fix=fix
    )


def _place(error: BaseException) -> str:
    """The file and line in which the error was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"line {last.lineno} of {last.filename}"


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"raytune_llm_metric_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

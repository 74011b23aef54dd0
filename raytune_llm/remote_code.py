"""Warns that Python code from a model's repository is about to run (model.trust_remote_code)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger("raytune_llm")
NAMING = ("config.json", "tokenizer_config.json", "processor_config.json")
"""Files that may have an `auto_map`, which names classes of that code."""


@cache
def announce(place: str, revision: str | None) -> None:
    """Warn once for each model that its own code runs next; a model without code gives no warning. place: a folder or a hub
    id."""
    if classes := sorted({name for file in NAMING for name in _classes(_read(place, file, revision))}):
        log.warning(
            "WARNING: model.trust_remote_code=true: Python code that comes with %s runs now, with all your rights (%s). Read it "
            "before you trust it; a local folder, or a commit as model.revision, keeps it as you have read it.",
            place,
            ", ".join(classes),
        )


def _read(place: str, name: str, revision: str | None) -> dict[str, Any]:
    """The JSON object in a file of the model, or {} if it is missing or damaged, which loading the model will report."""
    file: Any = Path(place) / name
    if not Path(place).is_dir():
        from transformers.utils.hub import cached_file

        missing_is_none = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        file = cached_file(place, name, revision=revision, **missing_is_none)
    try:
        values = json.loads(Path(file).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _classes(values: dict[str, Any]) -> Iterator[str]:
    """The classes that the auto_map names, as `file.class`. A tokenizer may have two (slow and fast)."""
    auto_map = values.get("auto_map")
    for named in auto_map.values() if isinstance(auto_map, dict) else ():
        yield from (name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str))

"""Paths of a run, made absolute once, where the command was typed: workers and Ray's processes have other working folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ALWAYS = ("output_dir", "data.cache")
IF_THERE = (
    "model.path", "model.tokenizer", "data.path", "data.eval_path", "data.dataset_info", "data.media_dir", "adapter.path",
    "stage.reference_model", "stage.reference_adapter", "serve.adapters", "serve.watch", "serve.adapter_roots", "chat.adapters",
)  # fmt: skip
"""That may name something on a hub or in a store as well: they are made absolute where a file or folder is there."""


def with_absolute_paths(run: Any) -> Any:
    """The same run; sections and settings that it has not are passed over."""
    for setting in (*ALWAYS, *IF_THERE):
        run = _changed(run, setting.split("."), always=setting in ALWAYS)
    return run


def _changed(section: Any, names: Sequence[str], *, always: bool) -> Any:
    name, *rest = names
    value = getattr(section, name, None)
    if value is None:
        return section
    new = _changed(value, rest, always=always) if rest else _absolute(value, always=always)
    return section if new is value or new == value else replace(section, **{name: new})


def _absolute(value: Any, *, always: bool) -> Any:
    if isinstance(value, dict):
        return {name: _absolute(path, always=always) for name, path in value.items()}
    if isinstance(value, list):
        return [_absolute(path, always=always) for path in value]
    if not isinstance(value, str) or "://" in value:
        return value
    path = Path(value).expanduser()
    try:
        there = always or path.exists()
    except OSError:
        there = False  # too long for a path: what it is meant to be is asked later
    return str(path.absolute()) if there else value  # a link keeps its name, which says the type of the file

"""Makes a run's paths absolute, once, in the process of the command: workers may have other working folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytune_llm.errors import ConfigError

ALWAYS = ("output_dir", "data.cache", "export.output_dir")
IF_THERE = (
    "model.path", "model.tokenizer", "model.merged_adapters",
    "data.path", "data.eval_path", "data.dataset_info", "data.media_dir", "adapter.path",
    "stage.reference_model", "stage.reference_adapter", "serve.adapters", "serve.watch", "serve.adapter_roots", "chat.adapters",
    "predict.run", "predict.adapters", "predict.judge", "export.run", "export.adapters",
    "evaluate.models", "evaluate.data",
)  # fmt: skip
"""Settings that can be a path or a name on a hub or in a store. They are made absolute if the file or folder exists."""
ONE_FILE = ("model.new_tokens",)
"""Like IF_THERE, but only a plain text is a path; items of a list or an object are not."""
ADDRESSES = ("data.path", "data.eval_path")
"""Of these, the ones that can be in an object store."""
TASKS = ("evaluate.tasks", "train.eval_tasks")
"""Lists of names and paths. An item with a slash or the suffix .yaml is a path."""


def check_addresses(run: Any) -> None:
    """Raises ConfigError for the address of an object store where only a file system is read, and for one without a bucket."""
    for setting in ALWAYS:
        for value in _texts(value_of(run, setting)):
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", value) and not re.match(r"[a-z][a-z0-9+.-]+://[^/]", value):
                rule = "must be a folder, or an address such as s3://bucket/folder"
                raise ConfigError(setting, rule, got=value, fix="Write the scheme in small letters, two slashes, and the bucket.")
    for setting in (*IF_THERE, *ONE_FILE, *TASKS):
        if setting in ADDRESSES:
            continue
        for value in _texts(value_of(run, setting)):
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
                fix = "Copy it to this machine, and name the copy."
                raise ConfigError(setting, "must be on a file system", got=value, fix=fix)


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for one in (value.values() if isinstance(value, dict) else value) for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def with_absolute_paths(run: Any) -> Any:
    """The run with absolute paths. Settings that this kind of run lacks are skipped."""
    return with_paths(run, _absolute)


def with_paths(run: Any, change: Callable[[str, str], str]) -> Any:
    """The run with each path replaced by `change(setting, path)`. Addresses with a scheme (s3://) are not changed."""
    for setting in (*ALWAYS, *IF_THERE, *ONE_FILE):
        each = _one if setting in ONE_FILE else _each
        run = _changed(run, setting.split("."), lambda path, setting=setting: change(setting, path), each)
    for setting in TASKS:
        run = _changed(run, setting.split("."), lambda name, setting=setting: _task(name, setting, change), _each)
    return run


def changed_paths(before: Any, after: Any) -> dict[str, Any]:
    """The path settings whose value in `after` differs from `before`, with their new values."""
    then = {setting: value_of(after, setting) for setting in (*ALWAYS, *IF_THERE, *ONE_FILE, *TASKS)}
    return {setting: value for setting, value in then.items() if value != value_of(before, setting)}


def value_of(run: Any, setting: str) -> Any:
    """The value of a dotted setting; None if the run has no such setting."""
    value = run
    for name in setting.split("."):
        value = getattr(value, name, None)
    return value


def _task(name: str, setting: str, change: Callable[[str, str], str]) -> str:
    return change(setting, name) if "/" in name or name.endswith((".yaml", ".yml")) else name


def _changed(section: Any, names: Sequence[str], change: Callable[[str], str], each: Callable[..., Any]) -> Any:
    name, *rest = names
    value = getattr(section, name, None)
    if value is None:
        return section
    new = _changed(value, rest, change, each) if rest else each(value, change)
    return section if new is value or new == value else replace(section, **{name: new})


def _each(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {name: _each(path, change) for name, path in value.items()}
    if isinstance(value, list):
        return [_each(path, change) for path in value]
    return _one(value, change)


def _one(value: Any, change: Callable[[str], str]) -> Any:
    return value if not isinstance(value, str) or "://" in value else change(value)


def expanded(value: str) -> Path:
    """The path with ~ and ~name replaced by home folders. If there is no such user, it stays as it is: a file's name may begin
    with ~."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)


def _absolute(setting: str, value: str) -> str:
    path, is_ours = expanded(value), setting in ALWAYS
    if is_ours and (not value.strip() or "\0" in value or path.absolute() == Path(path.absolute().anchor)):
        raise ConfigError(setting, "must name a folder", got=value, fix=f"For example, {setting}=mine.")
    if is_ours and value.startswith("~") and str(path).startswith("~"):
        rule = "must be in the home folder of a user who is here"
        raise ConfigError(setting, rule, got=value, fix=f"Write {setting}=./{value} for a folder of this name.")
    try:
        there = is_ours or path.exists()
    except OSError:
        there = False  # it is too long for a path; its use will show what it is
    return str(path.absolute()) if there else value  # links are not resolved: the link's name has the file type

"""Reads which data sets a run uses: `data.path`, or entries of a LLaMA-Factory dataset_info.json.

LLaMA-Factory's rules: if an entry has `columns`, every column that it does not name is absent, and likewise for `tags`; an entry
without them has the default names. These differ: a data set that is listed twice is used twice, an entry that names no column for
messages is refused, and `columns` of pairs can name a `margin`.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_llm.config.data import AlpacaFormat, DataConfig, FormatConfig, OpenAIFormat, ShareGPTFormat
from raytune_llm.config.paths import expanded
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.chunks import Source
from raytune_llm.data.readers.entries import TAG_NAMES, check_entry
from raytune_llm.data.readers.files import folder_of
from raytune_llm.data.readers.splits import Part
from raytune_llm.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One data set of a run."""

    name: str
    path: str
    subset: str | None
    split: str
    folder: str | None
    """The folder of its files in a hub data set."""
    num_samples: int | None
    format: FormatConfig
    media_dir: str
    hub: str
    """The hub that it is from, if it has no local files."""
    setting: str = "data.path"
    """The setting or key that names its location, for errors."""
    split_setting: str = "data.split"
    """The setting or key that names its split, for errors."""


def declared(data: DataConfig, *, ranked: bool) -> list[Declared]:
    """The data sets to train on, in order. ranked: the run needs pairs. Raises ConfigError or DataError."""
    if data.dataset_info is not None:
        return from_dataset_info(data.dataset_info, data.names, media_dir=data.media_dir, ranked=ranked, hub=data.hub)
    assert data.path is not None
    return [at_path(data, data.path)]


def declared_for_evaluation(data: DataConfig, *, ranked: bool) -> list[Declared]:
    """The data sets to evaluate on; empty if there are none, or if rows of the training data are held out instead."""
    if data.eval_names:
        assert data.dataset_info is not None
        return from_dataset_info(
            data.dataset_info, data.eval_names, media_dir=data.media_dir, ranked=ranked, hub=data.hub, setting="data.eval_names"
        )
    split = data.eval_split or data.split
    split_setting = "data.eval_split" if data.eval_split else "data.split"
    if isinstance(data.eval_path, dict):
        return [
            replace(at_path(data, path), name=name, split=split, setting=f"data.eval_path.{name}", split_setting=split_setting)
            for name, path in data.eval_path.items()
        ]
    if data.eval_path is None and data.eval_split is None:
        return []
    path = data.eval_path or data.path
    assert path is not None
    setting = "data.eval_path" if data.eval_path else "data.path"
    return [replace(at_path(data, path), split=split, setting=setting, split_setting=split_setting)]


def check_held_out(data: DataConfig, *, ranked: bool) -> None:
    """Raises ConfigError if data.eval_split shares rows with data.split. A data set that is explicitly named for training and for
    evaluation only gives a warning, since that is how one tests whether a model can memorize its rows."""
    for one in declared_for_evaluation(data, ranked=ranked):
        for trained in declared(data, ranked=ranked):
            if not _share_rows(one, trained):
                continue
            if data.eval_path is None and data.eval_split is not None:
                rule = f"must be other rows than those that are trained on (data.split={data.split})"
                fix = "Name another part, say data.split=train[:90%] data.eval_split=train[90%:], or set data.eval_fraction."
                raise ConfigError("data.eval_split", rule, got=data.eval_split, fix=fix)
            log.warning("%s is trained on and evaluated on: eval_loss says nothing of rows that the model has not seen", one.path)


def _share_rows(one: Declared, other: Declared) -> bool:
    if (one.path, one.subset, one.folder) != (other.path, other.subset, other.folder):
        return False
    if "+" in one.split + other.split:  # a hub's sum of splits
        return one.split == other.split
    return Part.of(one.split, one.split_setting).overlaps(Part.of(other.split, other.split_setting))


def at_path(data: DataConfig, path: str) -> Declared:
    """The data set at a path, in the run's format."""
    return Declared(
        name=path,
        path=path,
        subset=data.subset,
        split=data.split,
        folder=None,
        hub=data.hub,
        num_samples=data.num_samples,
        format=data.format,
        media_dir=data.media_dir or folder_of(path),
    )


def source_of(one: Declared) -> Source:
    """Where its rows are. Raises DataError if they are not there."""
    return sources.find(
        one.path,
        subset=one.subset,
        split=one.split,
        folder=one.folder,
        hub=one.hub,
        setting=one.setting,
        split_setting=one.split_setting,
    )


def from_dataset_info(
    path: str, names: list[str], *, media_dir: str | None, ranked: bool, hub: str = "huggingface", setting: str = "data.names"
) -> list[Declared]:
    """Entries of a dataset_info.json, which may be named by its folder."""
    file = expanded(path)
    try:
        file = file / "dataset_info.json" if file.is_dir() else file
        entries = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError("data.dataset_info", f"must be a file that can be read ({error.strerror})", got=path) from None
    except (ValueError, RecursionError) as error:
        raise DataError(str(file), f"is not valid JSON ({error})", "Correct the file.") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise DataError(str(file), "must hold an object of data sets by name", "Correct the file.")
    for name in names:
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1)
            fix = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(sorted(entries))}."
            raise ConfigError(setting, f"must be entries of {file}", got=name, fix=fix)
    return [_declared(name, entries[name], file, media_dir, ranked, hub) for name in names]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if a name occurs twice."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} is there twice")
    return dict(pairs)


def _declared(name: str, entry: Mapping[str, Any], file: Path, media_dir: str | None, ranked: bool, hub: str) -> Declared:
    where = f"{file}, {name}"
    check_entry(where, entry)
    if bool(entry.get("ranking", False)) != ranked:
        raise DataError(
            where,
            "holds pairs of answers, which this stage does not use"
            if not ranked
            else "holds no pairs of answers (ranking: true)",
            "Choose another data set, or another stage.",
        )
    path, hub = _place(where, entry, file.parent, hub)
    return Declared(
        name=name,
        path=path,
        hub=hub,
        subset=entry.get("subset"),
        split=entry.get("split") or "train",
        folder=entry.get("folder"),
        num_samples=entry.get("num_samples"),
        format=_format(where, entry),
        media_dir=media_dir or str(file.parent),
        setting=f"file_name of {name} in {file}",
        split_setting=f"split of {name} in {file}",
    )


HUB_KEYS = {"huggingface": "hf_hub_url", "modelscope": "ms_hub_url"}


def _place(where: str, entry: Mapping[str, Any], folder: Path, hub: str) -> tuple[str, str]:
    """The path or id of an entry's data, and its hub: the run's hub if the entry has an id for it, else another hub. For files,
    the hub has no meaning."""
    for name in (hub, *HUB_KEYS):
        if entry.get(HUB_KEYS[name]):
            return entry[HUB_KEYS[name]], name
    if entry.get("file_name"):
        return str((folder / entry["file_name"]).absolute()), hub
    if entry.get("cloud_file_name"):
        return entry["cloud_file_name"], hub
    given = ", ".join(sorted({"om_hub_url", "script_url"} & entry.keys())) or "no source"
    read = ", ".join([*HUB_KEYS.values(), "file_name", "cloud_file_name"])
    raise DataError(where, f"has {given}; what is read are {read}", "Fetch the data and give file_name.")


def _format(where: str, entry: Mapping[str, Any]) -> FormatConfig:
    columns: Mapping[str, Any] | None = entry.get("columns")
    if columns is None:
        columns = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
    ranked = bool(entry.get("ranking", False))
    shared: dict[str, Any] = {name: columns.get(name) for name in ("system", "tools", "images", "videos", "audios")}
    shared["chosen"] = columns.get("chosen") if ranked else None
    shared["rejected"] = columns.get("rejected") if ranked else None
    shared["margin"] = columns.get("margin") if ranked else None
    shared["label"] = columns.get("kto_tag")
    formatting = entry.get("formatting") or "alpaca"
    if formatting == "alpaca":
        if columns.get("prompt") is None:
            raise DataError(where, "names no column for prompt", "Add it to columns.")
        return AlpacaFormat(
            name="alpaca",
            instruction=columns["prompt"],
            input=columns.get("query"),
            output=columns.get("response"),
            history=columns.get("history"),
            **shared,
        )
    if columns.get("messages") is None:
        raise DataError(where, "names no column for messages", "Add it to columns.")
    tags: Mapping[str, Any] | None = entry.get("tags")
    if tags is None:
        tags = {
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        }
    roles = {name: tags.get(name) for name in TAG_NAMES[2:]}
    keys = {"role_tag": tags.get("role_tag", "from"), "content_tag": tags.get("content_tag", "value")}
    section: Any = TAGGED[formatting]
    return section(name=formatting, messages=columns["messages"], **shared, **roles, **keys)


TAGGED: Mapping[str, type] = {"sharegpt": ShareGPTFormat, "openai": OpenAIFormat}

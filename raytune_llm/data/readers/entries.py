"""Checks an entry of a dataset_info.json: a key that is not read is refused, with a suggestion of the right one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_llm.errors import DataError

TEXTS = (
    "file_name", "cloud_file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "file_sha1", "formatting", "subset",
    "split", "folder",
)  # fmt: skip
TYPES: Mapping[str, type] = {**dict.fromkeys(TEXTS, str), "ranking": bool, "num_samples": int, "columns": dict, "tags": dict}
"""The types of an entry's values. null counts as absent. Older files have a file_sha1, which LLaMA-Factory no longer reads."""
MEANT: Mapping[str, Mapping[str, str]] = {
    "": {
        "format": "formatting", "max_samples": "num_samples", "samples": "num_samples", "path": "file_name", "file": "file_name",
        "name": "subset", "config_name": "subset", "data_dir": "folder", "system_prompt": "columns.system", "type": "formatting",
    },
    "columns": {
        "input": "query", "instruction": "prompt", "output": "response", "conversations": "messages", "label": "kto_tag",
        "system_prompt": "system", "completion": "response", "answer": "response", "question": "prompt", "image": "images",
    },
    "tags": {
        "role": "role_tag", "content": "content_tag", "from": "role_tag", "value": "content_tag", "tool_tag": "observation_tag",
    },
}  # fmt: skip
"""Place of a key -> keys of other programs with the same meaning, for errors."""
_OF_ALL = ("system", "tools", "images", "videos", "audios", "chosen", "rejected", "margin", "kto_tag")
COLUMNS = {
    "alpaca": (*_OF_ALL, "prompt", "query", "response", "history"),
    "sharegpt": (*_OF_ALL, "messages"),
    "openai": (*_OF_ALL, "messages"),
}
"""Formatting -> the keys that `columns` may have."""
TAG_NAMES = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


def check_entry(where: str, entry: Mapping[str, Any]) -> None:
    """Raises DataError for an unknown key, a wrong type, or keys that don't fit together."""
    _known(where, "", entry, [*TYPES])
    _check_types(where, entry)
    formatting, columns = entry.get("formatting") or "alpaca", entry.get("columns") or {}
    if formatting not in COLUMNS:
        raise DataError(where, f"has the formatting {formatting!r}; there are {', '.join(COLUMNS)}", "Correct it.")
    _known(where, "columns", columns, COLUMNS[formatting], f"with the formatting {formatting}")
    _known(where, "tags", entry.get("tags") or {}, TAG_NAMES)
    if formatting == "alpaca" and entry.get("tags"):
        raise DataError(where, "has tags, which formatting alpaca does not use", "Correct formatting, or leave them out.")
    _check_pairs(where, columns, ranking=bool(entry.get("ranking")))


def _check_pairs(where: str, columns: Mapping[str, Any], *, ranking: bool) -> None:
    given = [name for name in ("chosen", "rejected", "margin") if columns.get(name) is not None]
    if not ranking and given:
        raise DataError(where, f"names columns.{given[0]}, which only rows with ranking: true have", "Add it, or leave that out.")
    if ranking and not {"chosen", "rejected"} <= {*given}:
        raise DataError(where, "has ranking: true and no columns for chosen and rejected", "Add them to columns.")
    if ranking and columns.get("kto_tag") is not None:
        raise DataError(where, "has ranking: true and a kto_tag: rows are pairs or have a verdict", "Leave one of the two out.")


def _known(where: str, place: str, given: Mapping[str, Any], known: Sequence[str], said: str = "") -> None:
    for key, value in given.items():
        if key in known or value is None:
            continue
        path = f"{place}.{key}" if place else key
        meant = MEANT[place].get(key)
        near = [meant] if meant in known or (meant and not place) else difflib.get_close_matches(key, known, n=1, cutoff=0.55)
        fix = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
        raise DataError(where, f"{path} is an unknown key {said}".rstrip(), fix)


def _check_types(where: str, entry: Mapping[str, Any]) -> None:
    given = [(key, entry[key], kind) for key, kind in TYPES.items() if entry.get(key) is not None]
    for key, value, kind in given:
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 1)):
            said = "a positive number" if kind is int else {str: "text", bool: "true or false", dict: "an object"}[kind]
            raise DataError(where, f"{key} must be {said}, got {value!r}", "Correct it.")
    for key in ("columns", "tags"):
        for name, value in (entry.get(key) or {}).items():
            if not isinstance(value, str | None):
                raise DataError(where, f"{key}.{name} must be text, got {value!r}", "Correct it.")

"""Assigns the files of a folder to splits, by the rules of the Hugging Face hub. The first rule that applies counts.

1. A folder that `save_to_disk` wrote lists its files (state.json, and dataset_dict.json if there are several splits).
2. `configs` in the head of README.md names files by subset and split.
3. data/<split>-00000-of-00005.parquet, for a split of any name.
4. A folder's name, or else a file's name, has a word for the split: train or training; validation, valid, val or dev; test,
   testing, eval or evaluation. Files without such a word are in no split.
5. All files are `train`.

File names are relative to the folder, with slashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml
from fsspec.utils import glob_translate

from raytune_llm.errors import NOT_YAML, DataError

Splits = dict[str, list[str]]
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_EDGE = "[-._ 0-9]"
_SHARD = re.compile(r"data/(?P<split>[^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_SPLIT = re.compile(r"(?P<name>\w+(?:[.-]\w+)*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_MANY = 10**12


@dataclass(frozen=True, slots=True)
class Part:
    """A split or a slice of one, in the notation of `datasets`: train, train[:1000], train[10%:20%], train[-100:]."""

    split: str
    start: str | None = None
    stop: str | None = None
    setting: str = "data.split"
    """The setting that names it, for errors."""

    @classmethod
    def of(cls, text: str, setting: str = "data.split") -> Part:
        found = _SPLIT.fullmatch(text.replace(" ", ""))
        edges = (found["start"], found["stop"]) if found else ()
        if found is None or any(edge and edge.endswith("%") and abs(int(edge[:-1])) > 100 for edge in edges):
            raise DataError(f"{setting}={text}", "is no split", "For example, train, train[:1000] or train[10%:20%].")
        return cls(found["name"], *(edges or (None, None)), setting)

    @property
    def is_whole(self) -> bool:
        return self.start is None and self.stop is None

    def rows(self, num_rows: int) -> range:
        """The rows of the slice, of num_rows in all. Negative bounds count from the end; percentages are of num_rows."""
        first, last = (_bound(edge, num_rows) for edge in (self.start or "0", self.stop or "100%"))
        return range(first, max(first, last))

    def overlaps(self, other: Part) -> bool:
        """Whether two slices share rows, for a split that is so large that bounds in rows and in percent don't meet."""
        mine, others = self.rows(_MANY), other.rows(_MANY)
        return self.split == other.split and max(mine.start, others.start) < min(mine.stop, others.stop)


def _bound(edge: str, num_rows: int) -> int:
    number = round(int(edge[:-1]) * num_rows / 100) if edge.endswith("%") else int(edge)
    return min(max(number + num_rows if number < 0 else number, 0), num_rows)


def splits_of(names: Sequence[str]) -> Splits:
    """The splits of these files by rules 3 to 5. The order of names is kept within a split."""
    shards: Splits = {}
    for name in names:
        if found := _SHARD.fullmatch(name):
            shards.setdefault(found["split"], []).append(name)
    if shards:
        return shards
    for says in (_a_folder_says, _the_file_says):
        found = {split: [name for name in names if any(says(name, word) for word in words)] for split, words in WORDS.items()}
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {"train": list(names)}


def _a_folder_says(name: str, word: str) -> bool:
    return any(re.fullmatch(rf"(.*{_EDGE})?{word}({_EDGE}.*)?", part) for part in PurePosixPath(name).parts[:-1])


def _the_file_says(name: str, word: str) -> bool:
    return re.fullmatch(rf"(.*{_EDGE})?{word}{_EDGE}.*", PurePosixPath(name).name) is not None


def of_one_file(name: str) -> set[str]:
    """The splits that a single file may stand for, by its name."""
    return {"train", *(split for split, words in WORDS.items() if any(_the_file_says(name, word) for word in words))}


def of_readme(text: str, names: Sequence[str], subset: str | None, where: str) -> Splits | None:
    """The splits that the head of README.md lists (rule 2); None if it lists none. Raises DataError for an unknown subset."""
    configs = _configs(text)
    if not configs:
        return None
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    chosen = subset or next(
        (name for name, config in by_name.items() if config.get("default") is True or name == "default" or len(by_name) == 1),
        None,
    )
    if chosen not in by_name:
        problem = "has several subsets" if subset is None else f"has no subset {subset!r}"
        raise DataError(where, problem, f"Set data.subset to one of {', '.join(by_name)}.")
    config = by_name[chosen]
    folder = str(config.get("data_dir") or "").strip("/")
    below = {name: name.removeprefix(f"{folder}/") for name in names if not folder or name.startswith(f"{folder}/")}
    if not config.get("data_files"):
        splits = splits_of(list(below.values()))
        return {split: [name for name, inside in below.items() if inside in files] for split, files in splits.items()}
    return {
        split: [name for name, inside in below.items() if any(_matches(inside, pattern) for pattern in patterns)]
        for split, patterns in _patterns(config["data_files"]).items()
    }


def _configs(text: str) -> list[Mapping[str, Any]]:
    found = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except NOT_YAML:
        return []
    configs = head.get("configs") if isinstance(head, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split -> patterns of its files. data_files is a pattern or a list of patterns (for `train`), or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    return patterns


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(glob_translate(pattern.removeprefix("./")), name) is not None


SAVED_DICT, SAVED_STATE = "dataset_dict.json", "state.json"


def saved(names: Iterable[str], read: Callable[[str], bytes], where: str) -> Splits | None:
    """The splits of a folder that `save_to_disk` wrote (rule 1); None for another folder. Raises DataError if files are
    missing."""
    there = set(names)
    if SAVED_DICT in there:
        splits = _object(read, SAVED_DICT, where).get("splits")
        if not isinstance(splits, list):
            raise DataError(f"{where}/{SAVED_DICT}", "names no splits", "Save the data set again.")
        return {str(split): _saved_files(there, read, f"{split}/", where)[1] for split in splits}
    if SAVED_STATE in there and "dataset_info.json" in there:
        split, files = _saved_files(there, read, "", where)
        return {split or "train": files}
    return None


def _saved_files(there: set[str], read: Callable[[str], bytes], below: str, where: str) -> tuple[str | None, list[str]]:
    if below + SAVED_STATE not in there:
        raise DataError(f"{where}/{below}{SAVED_STATE}", "is missing", "Copy the whole folder, or save the data set again.")
    state = _object(read, below + SAVED_STATE, where)
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(file, dict) and "filename" in file for file in listed):
        raise DataError(f"{where}/{below}{SAVED_STATE}", "names no files", "Save the data set again.")
    files = [f"{below}{file['filename']}" for file in listed]
    if missing := next((file for file in files if file not in there), None):
        raise DataError(f"{where}/{missing}", "is missing", "Copy the whole folder, or save the data set again.")
    split = state.get("_split")
    return (split if isinstance(split, str) else None), files


def _object(read: Callable[[str], bytes], name: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(read(name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}/{name}", f"is not valid JSON ({error})", "Save the data set again.") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}/{name}", "holds no object", "Save the data set again.")
    return value

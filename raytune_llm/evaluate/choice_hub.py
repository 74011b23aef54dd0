"""MMLU, C-Eval and CMMLU as a hub has them: parquet files by subject and split. subjects.json names and groups their subjects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from raytune_llm.config.paths import expanded
from raytune_llm.errors import ConfigError, DataError, first_line
from raytune_llm.evaluate.choice_files import LETTERS, ChoiceQuestion, Subject, not_empty, question_of, readable, split_of
from raytune_llm.hub import ask_hub, hub_failures

DATASETS = {"mmlu": "cais/mmlu", "ceval": "ceval/ceval-exam", "cmmlu": "haonan-li/cmmlu"}
REVISION = "refs/convert/parquet"
"""Where the Hugging Face hub has each data set as SUBJECT/SPLIT/*.parquet, whatever its authors uploaded (CMMLU: a script)."""
EXAMPLES = "dev"
SPLITS = {
    "mmlu": {"test": "test", "validation": "validation"},
    "ceval": {"test": "test", "validation": "val"},
    "cmmlu": {"test": "test"},
}
"""By benchmark: a task's split -> the data set's."""


def folder_of(data: str, tasks: Sequence[str]) -> Path:
    """evaluate.data as a folder: its own, or the tasks' files of a hub's data set in the cache of huggingface_hub. Raises
    ConfigError where it is neither."""
    folder = expanded(data)
    if folder.exists() or data.count("/") != 1 or data.startswith((".", "~", "/")):
        return folder
    address, state = ask_hub()
    if state == "not reached":
        rule = f"must be a folder that exists: no hub answers at {address}, where it could be a data set"
        raise ConfigError("evaluate.data", rule, got=data)
    try:
        return Path(snapshot_download(data, repo_type="dataset", allow_patterns=[f"{split_of(task)[0]}/*" for task in tasks]))
    except hub_failures() as error:
        rule = f"must be a folder, or a data set that the hub gives ({first_line(error)})"
        raise ConfigError("evaluate.data", rule, got=data) from error


def downloaded(task: str) -> Path:
    """The parquet files of a task in the cache of huggingface_hub. Raises ConfigError where the hub doesn't give them."""
    name, split = split_of(task)
    dataset = DATASETS[name]
    fix = (
        f"Where a hub is reached: `hf download {dataset} --repo-type dataset --revision {REVISION} --local-dir FOLDER/{name}`; "
        "then evaluate.data=FOLDER."
    )
    address, state = ask_hub()
    if state == "not reached":
        rule = f"must name a folder with the files of {task}: no hub answers at {address}, which could give {dataset}"
        raise ConfigError("evaluate.data", rule, got="null", fix=fix)
    wanted = [f"*/{one}/*.parquet" for one in (EXAMPLES, SPLITS[name][split])]
    try:
        return Path(snapshot_download(dataset, repo_type="dataset", revision=REVISION, allow_patterns=wanted))
    except hub_failures() as error:
        rule = f"must name a folder with the files of {task}: the hub doesn't give {dataset} ({first_line(error)})"
        raise ConfigError("evaluate.data", rule, got="null", fix=fix) from error


def has_parquet(folder: Path) -> bool:
    """Whether the folder holds a data set in a hub's layout: SUBJECT/SPLIT/*.parquet, or SUBJECT/SPLIT-*.parquet."""
    return any(folder.glob("*/*.parquet")) or any(folder.glob("*/*/*.parquet"))


def read_parquet_task(task: str, folder: Path) -> list[Subject]:
    """The task's subjects, by category. Raises ConfigError or DataError."""
    name, split = split_of(task)
    return [
        Subject(key, title, category, _rows(folder, key, EXAMPLES), _rows(folder, key, SPLITS[name][split]))
        for category, subjects in _subjects()[name].items()
        for key, title in subjects.items()
    ]


@cache
def _subjects() -> dict[str, dict[str, dict[str, str]]]:
    """Benchmark -> category -> subject -> its name in the prompt."""
    return json.loads((Path(__file__).parent / "subjects.json").read_text(encoding="utf-8"))


def _rows(folder: Path, subject: str, split: str) -> list[ChoiceQuestion]:
    from pyarrow import parquet

    files = sorted([*folder.glob(f"{subject}/{split}/*.parquet"), *folder.glob(f"{subject}/{split}-*.parquet")])
    if not files:
        raise DataError(f"{folder}/{subject}", f"holds no parquet file of the split {split}", "Download the data set again.")
    found = []
    for file in files:
        with readable(file):
            rows = parquet.read_table(file).to_pylist()
        found += [_question(row, f"row {number}", str(file)) for number, row in enumerate(rows, start=1)]
    return not_empty(found, f"{folder}/{subject}")


def _question(row: dict[str, Any], which: str, where: str) -> ChoiceQuestion:
    """MMLU has a list of choices and the number of the answer; the others a column a letter, and a letter."""
    named = {name.lower(): value for name, value in row.items()}
    choices = named["choices"] if "choices" in named else [named.get(letter.lower()) for letter in LETTERS]
    answer = named.get("answer")
    if isinstance(answer, int):
        answer = LETTERS[answer] if 0 <= answer < len(LETTERS) else None
    return question_of(named.get("question"), choices or [], answer, which, where, row)

"""Files of multiple-choice benchmarks in LLaMA-Factory's layout: a folder with mapping.json (of each subject, its name and its
category) and a zip file, or what is in that, with csv files by split and subject."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytune_llm.errors import ConfigError, DataError

LETTERS = ("A", "B", "C", "D")
SPLITS = {"train": "dev", "validation": "val", "test": "test"}
"""A task's split -> its folder."""


@dataclass(frozen=True)
class ChoiceQuestion:
    question: str
    choices: Mapping[str, str]
    """By their letters."""
    answer: str


@dataclass(frozen=True)
class Subject:
    key: str
    name: str
    category: str
    examples: Sequence[ChoiceQuestion]
    questions: Sequence[ChoiceQuestion]


@dataclass(frozen=True)
class Layout:
    path: Callable[[str, str], str]
    """(folder of the split, subject) -> path in the zip file."""
    columns: Sequence[str] | None
    """None: the first line names them."""


LAYOUTS = {
    "mmlu": Layout(lambda split, subject: f"data/{split}/{subject}_{split}.csv", ("question", *LETTERS, "answer")),
    "ceval": Layout(lambda split, subject: f"{split}/{subject}_{split}.csv", None),
    "cmmlu": Layout(lambda split, subject: f"{split}/{subject}.csv", None),
}


def read_task(task: str, folder: Path) -> list[Subject]:
    """`TASK_SPLIT`: its subjects in the order of its mapping.json. Raises ConfigError or DataError."""
    name, _, split = task.partition("_")
    if name not in LAYOUTS or split not in SPLITS or split == "train":
        known = "mmlu_test, mmlu_validation, ceval_validation, ceval_test, cmmlu_test"
        raise ConfigError("evaluate.tasks", f"must hold names of {known}", got=task)
    place = folder / name
    if not (place / "mapping.json").is_file():
        raise ConfigError("evaluate.data", f"must hold {name}/mapping.json", got=str(folder))
    try:
        mapping = json.loads((place / "mapping.json").read_text(encoding="utf-8"))
        described = [(key, str(one["name"]), str(one["category"])) for key, one in mapping.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"must be an object of subjects with name and category ({type(error).__name__}: {error})"
        raise DataError(str(place / "mapping.json"), problem) from None
    layout, read = LAYOUTS[name], _reader(place, name)

    def rows(folder_of_split: str, subject: str) -> list[ChoiceQuestion]:
        path = layout.path(folder_of_split, subject)
        return _questions(read(path), f"{place}/{path}", layout.columns)

    return [
        Subject(key, title, category, rows(SPLITS["train"], key), rows(SPLITS[split], key)) for key, title, category in described
    ]


def _reader(place: Path, name: str) -> Callable[[str], str]:
    """The text of a file, of the folder or else of its zip file."""
    packed = place / f"{name}.zip"
    names = set(zipfile.ZipFile(packed).namelist()) if packed.is_file() else set()

    def read(path: str) -> str:
        try:
            if (place / path).is_file():
                return (place / path).read_text(encoding="utf-8-sig")
            if path in names:
                with zipfile.ZipFile(packed) as archive:
                    return archive.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}/{path}", f"is not UTF-8 ({error.reason})", "Save it as UTF-8.") from None
        raise DataError(f"{place}/{path}", f"is neither a file nor in {name}.zip", "Copy the task's files there.")

    return read


def _questions(text: str, where: str, columns: Sequence[str] | None) -> list[ChoiceQuestion]:
    lines = list(csv.reader(io.StringIO(text)))
    names = list(columns) if columns is not None else [name.strip().lower() for name in lines.pop(0)] if lines else []
    found = []
    for number, line in enumerate(lines, start=1):
        row = dict(zip(names, line, strict=False))
        choices = {letter: row.get(letter, row.get(letter.lower())) for letter in LETTERS}
        given = {letter: text for letter, text in choices.items() if text is not None}
        answer = row.get("answer", "").strip()
        if not row.get("question") or len(given) < len(LETTERS) or answer not in ("", *given):
            problem = f"row {number} must have a question, the choices A to D and the letter of one as the answer, got {line}"
            raise DataError(where, problem[:300], "Correct the file.")
        found.append(ChoiceQuestion(row["question"], given, answer))
    if not found:
        raise DataError(where, "holds no questions", "Copy the task's files there.")
    return found

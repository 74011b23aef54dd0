"""Files of multiple-choice benchmarks in LLaMA-Factory's layout: a folder with mapping.json (of each subject, its name and its
category) and a zip file, or what is in that, with csv files by split and subject."""

from __future__ import annotations

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raytune_llm.errors import ConfigError, DataError, first_line

LETTERS = ("A", "B", "C", "D")
AVERAGE = "Average"
"""The name of the score over all questions of a task, next to the names of categories."""
LFS = b"version https://git-lfs.github.com/spec/"
"""The beginning of a Git LFS pointer file."""
DAMAGED = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
"""The errors of reading such files; RuntimeError: the zip file has a password."""
SPLITS = {"train": "dev", "validation": "val", "test": "test"}
"""A task's split -> its folder."""
TASKS = ("mmlu_test", "mmlu_validation", "ceval_validation", "ceval_test", "cmmlu_test")
MEANT = {"mmlu": "mmlu_test", "ceval": "ceval_validation", "cmmlu": "cmmlu_test"}
"""Benchmark -> its default task: the split with public answers, or the larger one if both have them."""


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
    """The names of columns; None: the first line has them."""


LAYOUTS = {
    "mmlu": Layout(lambda split, subject: f"data/{split}/{subject}_{split}.csv", ("question", *LETTERS, "answer")),
    "ceval": Layout(lambda split, subject: f"{split}/{subject}_{split}.csv", None),
    "cmmlu": Layout(lambda split, subject: f"{split}/{subject}.csv", None),
}


def split_of(task: str) -> tuple[str, str]:
    """The benchmark and the split of one of TASKS. Raises ConfigError for another name."""
    if task not in TASKS:
        known = f"{', '.join(TASKS)}, or {', '.join(MEANT)}"
        raise ConfigError("evaluate.tasks", f"must hold names of {known}", got=task)
    name, _, split = task.partition("_")
    return name, split


def read_task(task: str, folder: Path) -> list[Subject]:
    """The task's subjects, in the order of its mapping.json. Raises ConfigError or DataError."""
    name, split = split_of(task)
    place = folder / name
    if not (place / "mapping.json").is_file():
        fix = "Name the folder that holds it, or leave evaluate.data out: a hub's files are read then."
        raise ConfigError("evaluate.data", f"must hold {name}/mapping.json", got=str(folder), fix=fix)
    try:
        mapping = json.loads((place / "mapping.json").read_text(encoding="utf-8-sig"))
        described = [(key, one["name"], one["category"]) for key, one in mapping.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"must be an object of subjects with name and category ({type(error).__name__}: {error})"
        raise DataError(str(place / "mapping.json"), problem) from None
    for subject in described:
        if not all(isinstance(text, str) and text.strip() for text in subject) or subject[2] == AVERAGE or "/" in subject[2]:
            problem = f"must give each subject a name and a category, which is neither {AVERAGE} nor has a slash; got {subject}"
            raise DataError(str(place / "mapping.json"), problem, "Correct the file.")
    if not described:
        raise DataError(str(place / "mapping.json"), "names no subject", "Copy the task's files there.")
    layout, read = LAYOUTS[name], _reader(place, name)

    def rows(folder_of_split: str, subject: str) -> list[ChoiceQuestion]:
        path = layout.path(folder_of_split, subject)
        return _questions(read(path), f"{place}/{path}", layout.columns)

    return [
        Subject(key, title, category, rows(SPLITS["train"], key), rows(SPLITS[split], key)) for key, title, category in described
    ]


def _reader(place: Path, name: str) -> Callable[[str], str]:
    """The text of a file in the folder, or else in its zip file."""
    packed = place / f"{name}.zip"
    with readable(packed):
        names = set(zipfile.ZipFile(packed).namelist()) if packed.is_file() else set()

    def read(path: str) -> str:
        try:
            if (place / path).is_file():
                with readable(place / path):
                    return (place / path).read_text(encoding="utf-8-sig")
            if path in names:
                with readable(packed), zipfile.ZipFile(packed) as archive:
                    return archive.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}/{path}", f"is not UTF-8 ({error.reason})", "Save it as UTF-8.") from None
        raise DataError(f"{place}/{path}", f"is neither a file nor in {name}.zip", "Copy the task's files there.")

    return read


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """A context that raises DataError if the file is damaged or a Git LFS pointer."""
    try:
        yield
    except UnicodeDecodeError:
        raise
    except DAMAGED as error:
        if file.is_file() and _stands_for_another(file):
            raise DataError(str(file), "is a pointer of Git LFS, not the file itself", "Run `git lfs pull` there.") from None
        fix = "Copy or download it again."
        raise DataError(str(file), f"can't be read ({type(error).__name__}: {first_line(error)})", fix) from None


def _stands_for_another(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(LFS)) == LFS


def _questions(text: str, where: str, columns: Sequence[str] | None) -> list[ChoiceQuestion]:
    try:
        lines = [line for line in csv.reader(io.StringIO(text)) if line]
    except csv.Error as error:
        raise DataError(where, f"is no csv file that can be read ({error})", "Copy or download it again.") from None
    names = list(columns) if columns is not None else [name.strip().lower() for name in lines.pop(0)] if lines else []
    found = []
    for number, line in enumerate(lines, start=1):
        row = dict(zip(names, line, strict=False))
        choices = [row.get(letter, row.get(letter.lower())) for letter in LETTERS]
        found.append(question_of(row.get("question"), choices, row.get("answer", "").strip(), f"row {number}", where, line))
    return not_empty(found, where)


def question_of(
    question: str | None, choices: Sequence[str | None], answer: str | None, which: str, where: str, row: object
) -> ChoiceQuestion:
    """The question of a row. Raises DataError if the row is not a question."""
    given = {letter: text for letter, text in zip(LETTERS, choices, strict=False) if text is not None}
    if not question or len(given) < len(LETTERS) or len(choices) > len(LETTERS) or answer not in ("", *given):
        problem = f"{which} must have a question, the choices A to D and the letter of one as the answer, got {row}"
        raise DataError(where, problem[:300], "Correct the file.")
    return ChoiceQuestion(question, given, answer)


def not_empty(found: list[ChoiceQuestion], where: str) -> list[ChoiceQuestion]:
    if not found:
        raise DataError(where, "holds no questions", "Copy the task's files there.")
    return found

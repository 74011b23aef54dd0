"""Multiple-choice benchmarks in LLaMA-Factory's protocol: the answer is the likeliest first token among the letters A to D."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_llm.config.evaluate import EvaluateConfig
from raytune_llm.data.shards import BLOCK_ROWS
from raytune_llm.engines.questions import Answering, Question, in_blocks
from raytune_llm.engines.requests import Sampling
from raytune_llm.errors import ConfigError, DataError
from raytune_llm.evaluate.choice_files import AVERAGE, LETTERS, MEANT, ChoiceQuestion, Subject, read_task, split_of
from raytune_llm.evaluate.choice_hub import downloaded, folder_of, has_parquet, read_parquet_task
from raytune_llm.evaluate.choice_prompts import asked, examples_of
from raytune_llm.evaluate.models import Group
from raytune_llm.evaluate.results import Score, Shown
from raytune_llm.predict.rows import ConversationPrompts

CHINESE = ("ceval", "cmmlu")
SHOTS, SEED = 5, 42
"""The defaults of evaluate.shots and evaluate.seed."""


@dataclass(frozen=True)
class Task:
    name: str
    subjects: Sequence[Subject]
    lang: str


Letters = Mapping[str, Sequence[str]]
"""The answers to each subject's questions."""


class Choices:
    """The protocol llamafactory: its tasks, read and checked."""

    def __init__(self, settings: EvaluateConfig) -> None:
        self._settings = settings
        self._tasks = tasks_of(settings)
        self._prompts: dict[int, ConversationPrompts] = {}
        """By group."""
        self.questions = sum(len(questions_of(subject, settings)) for task in self._tasks for subject in task.subjects)
        self.contents = hashlib.sha256(repr(self._tasks).encode(errors="surrogatepass")).hexdigest()
        shots = shots_of(settings)
        self.facts = {"protocol": "llamafactory", "shots": shots}
        self.shown = Shown(
            f"Protocol `llamafactory`, {shots} shots. Percent of the questions answered rightly, and the standard error.",
            unit="% right",
            scale=100,
            digits=2,
            main=AVERAGE,
        )

    def check(self, group: Group) -> None:
        self._prompts[id(group)] = ConversationPrompts(group.model, group.data)

    def scores(
        self, group: Group, adapter: str | None, answer: Answering, progress: Callable[[int], None], folder: Path
    ) -> dict[str, dict[str, Score]]:
        found = {}
        for task in self._tasks:
            letters = answer_task(task, self._settings, self._prompts[id(group)], adapter, answer, progress)
            _write_letters(folder / f"{task.name}.json", letters)
            found[task.name] = scores_of(task, letters, self._settings)
        return found


def shots_of(settings: EvaluateConfig) -> int:
    return SHOTS if settings.shots is None else settings.shots


def tasks_of(settings: EvaluateConfig) -> list[Task]:
    """Raises ConfigError or DataError for one that can't be read."""
    names = [MEANT.get(name, name) for name in settings.tasks]
    benchmarks = [split_of(name)[0] for name in names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError("evaluate.tasks", f"must hold each task once: {twice[0]} comes twice", got=settings.tasks)
    folder = None if settings.data is None else folder_of(settings.data, names)
    tasks = []
    for name, benchmark in zip(names, benchmarks, strict=True):
        lang = settings.lang if settings.lang != "auto" else "zh" if benchmark in CHINESE else "en"
        tasks.append(Task(name, _subjects(name, benchmark, folder), lang))
    return tasks


def _subjects(task: str, benchmark: str, folder: Path | None) -> list[Subject]:
    """The subjects from files in LLaMA-Factory's or the hub's layout, or from a hub."""
    if folder is None:
        return read_parquet_task(task, downloaded(task))
    if has_parquet(folder / benchmark):
        return read_parquet_task(task, folder / benchmark)
    return read_task(task, folder)


def questions_of(subject: Subject, settings: EvaluateConfig) -> Sequence[ChoiceQuestion]:
    return subject.questions[: settings.max_questions]


def answer_task(
    task: Task,
    settings: EvaluateConfig,
    prompts: ConversationPrompts,
    adapter: str | None,
    answer: Answering,
    progress: Callable[[int], None],
) -> Letters:
    """The answers of one model. progress: called with the number of newly answered questions. Raises DataError for a question
    that is too long."""
    letter_of = letter_ids(prompts.tokenizer)
    sampling = Sampling(max_new_tokens=1, among=tuple(letter_of), ignore_end=True)
    found: dict[str, list[str]] = {subject.key: [] for subject in task.subjects}
    keys = [subject.key for subject in task.subjects for _ in questions_of(subject, settings)]
    at = 0
    for answers in answer(in_blocks(Question(ids, (), adapter, sampling) for ids in _prompts(task, settings, prompts))):
        for one in answers:
            if one.refused is not None:
                raise DataError(
                    f"{task.name}, {keys[at]}, question {len(found[keys[at]]) + 1}",
                    f"with {shots_of(settings)} examples {one.refused}",
                    "Lower evaluate.shots.",
                )
            found[keys[at]].append(letter_of[one.ids[0]])
            at += 1
        progress(len(answers))
    return found


def letter_ids(tokenizer: Any) -> dict[int, str]:
    """The last token of each letter when it is tokenized alone."""
    ids = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in LETTERS]
    assert len(set(ids)) == len(LETTERS)
    return dict(zip(ids, LETTERS, strict=True))


def _prompts(task: Task, settings: EvaluateConfig, prompts: ConversationPrompts) -> Iterator[tuple[int, ...]]:
    for subject in task.subjects:
        examples = examples_of(subject, shots_of(settings), SEED if settings.seed is None else settings.seed)
        questions = questions_of(subject, settings)
        for start in range(0, len(questions), BLOCK_ROWS):
            block = questions[start : start + BLOCK_ROWS]
            yield from prompts([asked(question, examples, subject.name, task.lang) for question in block], subject.key)


def scores_of(task: Task, letters: Letters, settings: EvaluateConfig) -> dict[str, Score]:
    """The scores over all questions, and by category and subject. Questions without a known answer are left out."""
    counts: dict[str, list[int]] = {}
    for subject in task.subjects:
        for question, letter in zip(questions_of(subject, settings), letters[subject.key], strict=True):
            if question.answer:
                for name in (AVERAGE, subject.category, f"{subject.category}/{subject.key}"):
                    count = counts.setdefault(name, [0, 0])
                    count[0] += letter == question.answer
                    count[1] += 1
    return {name: _score(*count, in_table="/" not in name) for name, count in counts.items()}


def _score(correct: int, questions: int, *, in_table: bool) -> Score:
    """The fraction of right answers, with its standard error."""
    mean = correct / questions
    stderr = math.sqrt(mean * (1 - mean) / (questions - 1)) if questions > 1 else None
    return Score(mean, stderr, {"correct": correct, "questions": questions}, in_table)


def _write_letters(path: Path, letters: Letters) -> None:
    """Write the answers in LLaMA-Factory's format: for each subject, question number (from 0) -> letter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = {subject: {str(number): letter for number, letter in enumerate(found)} for subject, found in letters.items()}
    path.write_text(json.dumps(numbered, indent=2) + "\n")

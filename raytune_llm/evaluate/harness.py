"""The protocol lm_eval: tasks of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raytune_llm.config.evaluate import EvaluateConfig
from raytune_llm.engines.harness import DEFAULT_OTHER_SEED, EngineLM, data_of, load_tasks, questions_of, run_tasks, scores_of
from raytune_llm.engines.questions import Answering
from raytune_llm.errors import ConfigError
from raytune_llm.evaluate.models import Group
from raytune_llm.evaluate.results import Score, Shown, TaskScores
from raytune_llm.serve.engines import tokenizer_of

TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow")


class Harness:
    """The tasks, loaded with their data."""

    def __init__(self, settings: EvaluateConfig) -> None:
        self._settings = settings
        self._seed = DEFAULT_OTHER_SEED if settings.seed is None else settings.seed
        self._loaded = load_tasks(settings.tasks, "evaluate.tasks")
        data = data_of([one for found in self._loaded.values() for one in found])
        self.contents = _contents(settings.tasks, data)
        self.questions = sum(questions_of(task, settings.max_questions) for task in self._loaded.values())
        self.facts: dict[str, Any] = {
            "protocol": "lm_eval",
            "lm_eval": version("lm_eval"),
            "chat_template": settings.apply_chat_template,
            "tasks": {},
        }
        self.shown = Shown(
            f"Protocol `lm_eval` (lm-evaluation-harness {version('lm_eval')}"
            f"{', with the chat template' if settings.apply_chat_template else ''}). The scores and their standard errors.",
            unit="",
            scale=1,
            digits=4,
            main=None,
        )
        self._tokenizers: dict[int, Any] = {}
        """By group."""

    def check(self, group: Group) -> None:
        tokenizer, _ = tokenizer_of(group.model, group.served(self._settings))
        if self._settings.apply_chat_template and not tokenizer.chat_template:
            fix = "Set evaluate.template, or leave it out."
            raise ConfigError("evaluate.apply_chat_template", "needs a model with a chat template", got=True, fix=fix)
        self._tokenizers[id(group)] = tokenizer

    def scores(
        self, group: Group, adapter: str | None, answer: Answering, progress: Callable[[int], None], folder: Path
    ) -> TaskScores:
        lm = EngineLM(answer, self._tokenizers[id(group)], adapter, progress)
        results = run_tasks(
            lm,
            list(self._loaded.values()),
            shots=self._settings.shots,
            max_questions=self._settings.max_questions,
            seed=self._seed,
            apply_chat_template=self._settings.apply_chat_template,
            fewshot_as_multiturn=self._settings.fewshot_as_multiturn,
            system=self._settings.system,
            run_unsafe_code=self._settings.run_unsafe_code,
        )
        _write_samples(folder, results["samples"])
        for task, task_version in results["versions"].items():
            self.facts["tasks"][task] = {"version": task_version, "shots": results["n-shot"].get(task)}
        return {
            task: {name: Score(one.value, one.stderr, {"higher_is_better": one.higher_is_better}) for name, one in found.items()}
            for task, found in scores_of(results).items()
        }


def _contents(tasks: Sequence[str], data: Sequence[Path]) -> str:
    """A hash of the package's version, of tasks' YAML files with the files next to them (functions and data), and of data
    elsewhere."""
    digest = hashlib.sha256(version("lm_eval").encode())
    places = [place for place in map(Path, tasks) if place.exists()]
    beside = [file for place in places for file in (place.rglob("*") if place.is_dir() else place.parent.iterdir())]
    rows = [file for place in data for file in (place.rglob("*") if place.is_dir() else [place])]
    for file in sorted({*(file for file in beside if file.suffix in TASK_FILES), *rows}):
        if file.is_file():
            there = file.stat()
            digest.update(f"{file}, {there.st_size} bytes of {there.st_mtime_ns}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _write_samples(folder: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a file for each task, with one line per question: request, answer and scores, in the package's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        lines = [json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows]
        # A backslash and its number are JSON's own way to write a lone surrogate.
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

"""A run's reward model as the judge of answers: it scores generated and given answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.config.data import DataConfig
from raytune_llm.config.load import load_config
from raytune_llm.config.run import PredictRun
from raytune_llm.engines.engine import Engine
from raytune_llm.engines.questions import Question, scored_together
from raytune_llm.errors import ConfigError
from raytune_llm.predict.models import served_with
from raytune_llm.predict.predictions import REWARDS, lines
from raytune_llm.predict.rows import PromptRows
from raytune_llm.runs.trained import Trained, read_trained

AT_ONCE = 64
"""The number of rows that are rendered and scored together."""


class Judge:
    def __init__(self, run: PredictRun) -> None:
        """Raises ConfigError unless predict.judge is a finished run of a reward model."""
        assert run.predict.judge is not None
        self._trained = read_trained(run.predict.judge, "predict.judge")
        if self._trained.run.stage.writes:
            fix = "Train one with stage=reward."
            raise ConfigError(
                "predict.judge", "must be the output folder of a reward model's run", got=run.predict.judge, fix=fix
            )
        self._data = _rendered_as(self._trained, run.data)
        self._settings = run.predict
        PromptRows(self._trained.model, self._data)  # its tokenizer and template are there

    def measure(self, folder: Path, models: Sequence[str | None]) -> dict[str | None, dict[str, float]]:
        """Score the folder's predictions, write rewards.jsonl, and return model -> metrics."""
        engine = self._engine()
        rows = PromptRows(self._trained.model, self._data)
        try:
            given = list(_scores(engine, rows.with_answers(None)))
            by_model = {model: list(_scores(engine, rows.with_answers(_answers(folder, model)))) for model in models}
        finally:
            engine.close()
        written = []
        for number, label in enumerate(given):
            for model in models:
                own = {"row": number + 1, "model": model or "base", "reward": by_model[model][number], "label_reward": label}
                written.append(json.dumps(own) + "\n")
        write_atomically(folder / REWARDS, "".join(written))
        return {model: _numbers(scores, given) for model, scores in by_model.items()}

    def _engine(self) -> Engine:
        from raytune_llm.serve.engines import build_engine  # torch

        adapter = self._trained.adapter
        served = served_with(
            {} if adapter is None else {self._trained.name: str(adapter)},
            max_rank=None,
            precision=self._settings.precision,
            max_length=None,
            template=self._data.template,
        )
        plain = load_config("predict", ["model.path=none", "data.path=none", "output_dir=none"])
        engine, facts = build_engine(self._trained.model, self._trained.run.quantization, plain.engine, served)
        assert facts.scores, "its stage made a reward model"
        return engine


def _rendered_as(trained: Trained, data: DataConfig) -> DataConfig:
    """The rows, rendered as in the reward model's training."""
    return trained.rendered(replace(data, template=None, tool_format=None))


def _answers(folder: Path, model: str | None) -> Iterator[str | None]:
    return (one["predict"] for one in lines(folder) if one["model"] == (model or "base"))


def _scores(engine: Engine, conversations: Iterable[tuple[int, ...] | None]) -> Iterator[float | None]:
    """The scores of whole conversations, given as token ids, in order."""
    block: list[tuple[int, ...] | None] = []
    for ids in conversations:
        block.append(ids)
        if len(block) == AT_ONCE:
            yield from _block_scores(engine, block)
            block = []
    yield from _block_scores(engine, block)


def _block_scores(engine: Engine, block: Sequence[tuple[int, ...] | None]) -> list[float | None]:
    found: list[float | None] = [None] * len(block)
    fit = ((number, ids) for number, ids in enumerate(block) if ids is not None and len(ids) <= engine.max_length)
    for group in scored_together((number, Question(ids, (), None, None)) for number, ids in fit):
        scores = engine.pooled([one.prompt_ids for _, one in group], "score").result()
        for (number, _), (score,) in zip(group, scores, strict=True):
            found[number] = score
    return found


def _numbers(scores: Sequence[float | None], given: Sequence[float | None]) -> dict[str, float]:
    """The means over rows with a score, and the fractions of wins and draws against given answers, if there are any."""
    own = [score for score in scores if score is not None]
    labels = [score for score in given if score is not None]
    pairs = [(score, label) for score, label in zip(scores, given, strict=True) if score is not None and label is not None]
    numbers: dict[str, float] = {}
    if own:
        numbers["reward"] = fmean(own)
    if labels:
        numbers["label_reward"] = fmean(labels)
    if pairs:
        numbers["reward_win_rate"] = fmean((score > label) + (score == label) / 2 for score, label in pairs)
    return numbers


def judged(judge: Judge | None, folder: Path, models: Sequence[str | None], measured: dict[str, dict[str, Any]]) -> None:
    """Add the judge's metrics to those of each model."""
    if judge is not None:
        for model, numbers in judge.measure(folder, models).items():
            measured[model or "base"] |= numbers

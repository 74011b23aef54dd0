from __future__ import annotations

from typing import Literal

from raytune_llm.config.section import NonNegativeInt, PositiveInt, Seed, section
from raytune_llm.errors import ConfigError


@section
class EvaluateConfig:
    """Benchmarks, by a protocol that is named with every number."""

    models: list[str]
    """Output folders of runs, evaluated side by side; adapters of one base share it. Empty: `model`."""
    base: bool
    """Evaluate the bases of the runs, too."""
    protocol: Literal["llamafactory"]
    """llamafactory: questions as chat turns, and the likeliest of the letters A to D as the first token of the answer."""
    tasks: list[str]
    """For protocol=llamafactory: TASK_SPLIT, such as mmlu_test, ceval_validation, cmmlu_test."""
    data: str | None
    """The folder that holds a folder for each TASK, with its mapping.json, and its zip file or what was in it."""
    shots: NonNegativeInt
    """Examples before each question, the first ones of a subject's `dev` file as the seed orders them."""
    lang: Literal["auto", "en", "zh"]
    """The language of the prompt around a question. auto: zh for ceval and cmmlu."""
    max_questions: PositiveInt | None
    """The most questions of one subject; null: all."""
    seed: Seed
    template: str | None
    """A named chat template; null: a run's, or the tokenizer's own."""
    precision: Literal["auto", "bf16", "fp32"]
    max_length: PositiveInt | None
    """Maximum tokens of a question with its examples; null: the model's positions, as far as the cache holds them."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("evaluate.tasks", "must name a task", got=[], fix="For example, evaluate.tasks=[mmlu_test].")
        if self.data is None:
            raise ConfigError("evaluate.data", "must name the folder with the tasks' files", got="null")
        if twice := [name for name in self.models if self.models.count(name) > 1]:
            raise ConfigError("evaluate.models", "must hold each run once", got=twice[0])

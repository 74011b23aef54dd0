from __future__ import annotations

from typing import Literal

from raytune_llm.config.section import NonNegativeInt, PositiveInt, Seed, section
from raytune_llm.errors import ConfigError


@section
class EvaluateConfig:
    """Benchmarks, by a protocol that is named with every number."""

    models: list[str]
    """Evaluated side by side: output folders of runs, folders of models (an export, what transformers saved), models of a hub
    (owner/name), folders of PEFT's adapters. Adapters of one base share it. Empty: `model`."""
    base: bool
    """Evaluate the bases of adapters, too. That of a PEFT adapter is `model`, or the one that its config names."""
    protocol: Literal["llamafactory", "lm_eval"]
    """llamafactory: questions as chat turns, and the likeliest of the letters A to D as the first token of the answer.
    lm_eval: tasks of lm-evaluation-harness, asked and scored by that package."""
    tasks: list[str]
    """For protocol=llamafactory: mmlu, ceval, cmmlu, or one with its split, such as mmlu_validation. For protocol=lm_eval: names
    of tasks, groups and tags, such as gsm8k; YAML files; folders with YAML files, written with a slash."""
    data: str | None
    """For protocol=llamafactory: the folder that holds a folder for each benchmark, with its mapping.json and its zip file or
    what is in it, or with a hub's parquet files; or a hub's data set (owner/name) of such folders. null: the benchmarks' own data
    sets on a hub."""
    shots: NonNegativeInt | None
    """Examples before each question. null: 5 for protocol=llamafactory, the task's own number for protocol=lm_eval."""
    lang: Literal["auto", "en", "zh"]
    """For protocol=llamafactory: the language of the prompt around a question. auto: zh for ceval and cmmlu."""
    apply_chat_template: bool
    """For protocol=lm_eval: write questions as user turns. llamafactory always does."""
    fewshot_as_multiturn: bool
    """For protocol=lm_eval with a chat template: each example is a turn of its own."""
    system: str | None
    """For protocol=lm_eval: a text before the prompt, or the system turn."""
    run_unsafe_code: bool
    """For protocol=lm_eval: allow tasks that run programs which the model wrote."""
    max_questions: PositiveInt | None
    """The most questions of one subject, or of one task; null: all."""
    seed: Seed | None
    """The seed of the choice of examples. null: 42 for protocol=llamafactory, the package's own for protocol=lm_eval."""
    template: str | None
    """A named chat template; null: a run's, or the tokenizer's own."""
    precision: Literal["auto", "bf16", "fp32"]
    max_length: PositiveInt | None
    """Maximum tokens of a question with its examples; null: the model's positions, as far as the cache holds them."""

    def __post_init__(self) -> None:
        if not self.tasks:
            fix = "For example, evaluate.tasks=[mmlu_test]."
            raise ConfigError("evaluate.tasks", "must name a task", got=[], fix=fix)
        for values in (self.models, self.tasks):
            if twice := [name for name in values if values.count(name) > 1]:
                setting, rule = ("models", "each model once") if values is self.models else ("tasks", "each task once")
                raise ConfigError(f"evaluate.{setting}", f"must hold {rule}", got=twice[0])
        PROTOCOL_RULES[self.protocol](self)


def _check_llamafactory(settings: EvaluateConfig) -> None:
    for name in ("apply_chat_template", "system", "run_unsafe_code"):
        if (got := getattr(settings, name)) not in (None, False):
            raise ConfigError(f"evaluate.{name}", "is of evaluate.protocol=lm_eval", got=got, fix="Leave it out.")


def _check_lm_eval(settings: EvaluateConfig) -> None:
    if settings.data is not None:
        fix = "Leave it out: a task says where its data are."
        raise ConfigError("evaluate.data", "is of evaluate.protocol=llamafactory", got=settings.data, fix=fix)
    if settings.lang != "auto":
        raise ConfigError("evaluate.lang", "is of evaluate.protocol=llamafactory", got=settings.lang, fix="Leave it out.")


PROTOCOL_RULES = {"llamafactory": _check_llamafactory, "lm_eval": _check_lm_eval}

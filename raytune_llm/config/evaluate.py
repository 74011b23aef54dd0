from __future__ import annotations

from typing import Literal

from raytune_llm.config.section import NonNegativeInt, PositiveInt, Seed, section
from raytune_llm.errors import ConfigError


@section
class EvaluateConfig:
    """Benchmarks. Each result names the protocol that it was measured with."""

    models: list[str]
    """Models to evaluate side by side: output folders of runs, folders with a model or a PEFT adapter, or hub ids (owner/name).
    Adapters of one base share it. Empty: evaluate `model`."""
    base: bool
    """Also evaluate the base of each adapter. For a PEFT adapter, that is `model`, or else the base that its config names."""
    protocol: Literal["llamafactory", "lm_eval"]
    """llamafactory: questions are chat turns, and the answer is the most likely of the letters A to D as the first token.
    lm_eval: lm-evaluation-harness asks and scores its own tasks."""
    tasks: list[str]
    """For protocol=llamafactory: mmlu, ceval, cmmlu, or one with its split, such as mmlu_validation. For protocol=lm_eval: names
    of tasks, groups and tags, such as gsm8k; YAML files; folders with YAML files, written with a slash."""
    data: str | None
    """For protocol=llamafactory: a folder with one folder for each benchmark, which holds its mapping.json and its zip file (or
    the zip's content), or the hub's parquet files. It can also be a hub data set (owner/name) with such folders. null: the
    benchmarks' own data sets on the hub."""
    shots: NonNegativeInt | None
    """Number of examples before each question. null: 5 for protocol=llamafactory, the task's own number for protocol=lm_eval."""
    lang: Literal["auto", "en", "zh"]
    """For protocol=llamafactory: the language of the prompt around a question. auto: zh for ceval and cmmlu."""
    apply_chat_template: bool
    """For protocol=lm_eval: write questions as user turns. protocol=llamafactory always does."""
    fewshot_as_multiturn: bool
    """For protocol=lm_eval with a chat template: write each example as a turn of its own."""
    system: str | None
    """For protocol=lm_eval: text before the prompt; with a chat template, the system turn."""
    run_unsafe_code: bool
    """For protocol=lm_eval: allow tasks that execute code which the model wrote."""
    max_questions: PositiveInt | None
    """Maximum questions of one subject (llamafactory) or task (lm_eval); null: all."""
    seed: Seed | None
    """The seed that examples are chosen with. null: 42 for protocol=llamafactory, the package's default for protocol=lm_eval."""
    template: str | None
    """A named chat template; null: the run's, or else the tokenizer's own."""
    precision: Literal["auto", "bf16", "fp32"]
    max_length: PositiveInt | None
    """Maximum tokens of a question with its examples; null: the model's maximum, or the size of the KV cache if that is less."""

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
    if not settings.fewshot_as_multiturn:
        rule = "is of evaluate.protocol=lm_eval: here each example is a turn of its own"
        raise ConfigError("evaluate.fewshot_as_multiturn", rule, got=False, fix="Leave it out.")


def _check_lm_eval(settings: EvaluateConfig) -> None:
    if settings.data is not None:
        fix = "Leave it out: a task says where its data are."
        raise ConfigError("evaluate.data", "is of evaluate.protocol=llamafactory", got=settings.data, fix=fix)
    if settings.lang != "auto":
        raise ConfigError("evaluate.lang", "is of evaluate.protocol=llamafactory", got=settings.lang, fix="Leave it out.")
    if settings.template is not None and not settings.apply_chat_template:
        fix = "Set evaluate.apply_chat_template=true, or leave it out."
        rule = "is for questions as a user's turns: protocol lm_eval asks in plain text"
        raise ConfigError("evaluate.template", rule, got=settings.template, fix=fix)


PROTOCOL_RULES = {"llamafactory": _check_llamafactory, "lm_eval": _check_lm_eval}

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Seed, section
from raytune_llm.errors import ConfigError


@section
class PredictConfig:
    """Answers for a data set, and what they are measured by."""

    run: str | None
    """The output folder of a run: its model, its adapter and its chat template answer. null: `model` does."""
    adapters: dict[str, str]
    """More adapters by name, folders that training wrote or PEFT saved: each row is answered with each of them."""
    base: bool | Literal["auto"]
    """Whether the model answers without an adapter, too. auto: where there is no adapter."""
    generate: bool
    """Write answers."""
    score: bool
    """Log-probability of each given answer, in nats, and their perplexity."""
    metrics: list[str]
    """Any of exact_match, f1, bleu, rouge, llamafactory; or your own function as FILE.py:NAME or package.module:NAME, which takes
    the answers, the references and the rows, all as lists, and returns a number or numbers by name."""
    judge: str | None
    """The output folder of a reward model's run, whose scores of the answers and the given answers are more numbers."""
    max_new_tokens: PositiveInt
    temperature: Annotated[float, Field(ge=0, le=2)]
    """0: the likeliest token."""
    top_p: Fraction
    top_k: NonNegativeInt
    """0: every token is a candidate."""
    repetition_penalty: PositiveFloat
    stop: list[str]
    """Texts that end an answer."""
    seed: Seed
    """The seed of sampling; each row has its own generator, whatever else is computed."""
    max_rank: PositiveInt | None
    """The highest rank that adapters may have; null: the highest of those that are given."""
    precision: Literal["auto", "bf16", "fp32"]
    max_length: PositiveInt | None
    """Maximum tokens of a prompt and its answer; null: the model's positions, as far as the cache holds them."""
    llamafactory_files: bool
    """Write generated_predictions.jsonl and predict_results.json, too, as LLaMA-Factory does."""
    resume: Literal["auto", "never"]
    """auto: rows that the output folder has are kept. never: it starts anew."""

    def __post_init__(self) -> None:
        if not self.generate and not self.score:
            raise ConfigError("predict.generate", "must be true if predict.score is false", got=False)
        if self.judge is not None and not self.generate:
            rule = "judges answers, of which predict.generate=false makes none"
            raise ConfigError("predict.judge", rule, got=self.judge, fix="Leave one of them out.")
        if twice := [name for name in self.metrics if self.metrics.count(name) > 1]:
            raise ConfigError("predict.metrics", "must hold each metric once", got=twice[0])
        if "" in self.stop:
            raise ConfigError("predict.stop", "must hold no empty text", got=self.stop)
        for name in self.adapters:
            if not name.strip():
                raise ConfigError("predict.adapters", "must have names", got=sorted(self.adapters))

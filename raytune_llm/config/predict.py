from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Seed, section
from raytune_llm.errors import ConfigError


@section
class PredictConfig:
    """Answers for a data set, and the metrics that they are measured by."""

    run: str | None
    """The output folder of a run, whose model, adapter and chat template are used. null: `model`."""
    adapters: dict[str, str]
    """Name -> folder of more adapters (written by training or by PEFT). Each row is answered with each of them."""
    base: bool | Literal["auto"]
    """Also answer without an adapter. auto: if there is no adapter."""
    generate: bool
    """Generate answers."""
    score: bool
    """Compute the log-probability of each row's given answer in nats, and the perplexity of all."""
    metrics: list[str]
    """Any of exact_match, f1, bleu, rouge and llamafactory, or your own function as FILE.py:NAME or package.module:NAME. It is
    called with lists of the answers, the references and the rows, and returns a number or {name: number}."""
    judge: str | None
    """The output folder of a reward model's run. Its scores of the answers and of the rows' given answers become metrics."""
    max_new_tokens: PositiveInt
    temperature: Annotated[float, Field(ge=0, le=2)]
    """0: greedy decoding."""
    top_p: Fraction
    top_k: NonNegativeInt
    """0: every token is a candidate."""
    repetition_penalty: PositiveFloat
    stop: list[str]
    """Texts that end an answer."""
    seed: Seed
    """The seed of sampling. Each row has a generator of its own, so its answer does not depend on other rows."""
    max_rank: PositiveInt | None
    """Maximum rank of an adapter; null: the highest rank of those that are given."""
    precision: Literal["auto", "bf16", "fp32"]
    max_length: PositiveInt | None
    """Maximum tokens of a prompt and its answer; null: the model's maximum, or the size of the KV cache if that is less."""
    llamafactory_files: bool
    """Also write generated_predictions.jsonl and predict_results.json in LLaMA-Factory's form."""
    resume: Literal["auto", "never"]
    """auto: keep the answers that the output folder already has. never: start over."""

    def __post_init__(self) -> None:
        if not self.generate and not self.score:
            raise ConfigError("predict.generate", "must be true if predict.score is false", got=False)
        if self.judge is not None and not self.generate:
            rule = "judges generated answers, and predict.generate=false generates none"
            raise ConfigError("predict.judge", rule, got=self.judge, fix="Leave one of them out.")
        if twice := [name for name in self.metrics if self.metrics.count(name) > 1]:
            raise ConfigError("predict.metrics", "must hold each metric once", got=twice[0])
        if "" in self.stop:
            raise ConfigError("predict.stop", "must hold no empty text", got=self.stop)
        for name in self.adapters:
            if not name.strip():
                raise ConfigError("predict.adapters", "must have names", got=sorted(self.adapters))

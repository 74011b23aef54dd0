"""The base model and adapters that an engine serves for a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from raytune_llm.config.serve import ServedModels
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.saved import rank_of, task_of
from raytune_llm.runs.trained import Trained

MIN_RANK = 8


class PredictedModels(ServedModels):
    setting: ClassVar[str] = "predict.adapters"


def check_writes(folder: str, setting: str) -> None:
    """Raises ConfigError, naming the setting, unless the folder has an adapter of a language model."""
    if task_of(folder, setting) == "SEQ_CLS":
        rule = "must write texts: it is a reward model's"
        raise ConfigError(setting, rule, got=folder, fix="raytune-llm serve answers /v1/score with it.")


def check_run_writes(trained: Trained, setting: str) -> None:
    """Raises ConfigError, naming the setting, unless the run made a language model."""
    if not trained.run.stage.writes:
        fix = "predict.judge takes it, and raytune-llm serve answers /v1/score with it."
        raise ConfigError(setting, "must write texts: it is a reward model's", got=str(trained.final.parent), fix=fix)


def served_with(
    adapters: Mapping[str, str],
    *,
    max_rank: int | None,
    precision: Literal["auto", "bf16", "fp32"],
    max_length: int | None,
    template: str | None,
) -> ServedModels:
    """Settings of an engine that holds all of these adapters at once. max_rank: None is the highest of their ranks."""
    ranks = [rank_of(folder, f"the adapter {name}") for name, folder in adapters.items()]
    return PredictedModels(
        adapters=dict(adapters),
        base_name=None,
        max_adapters=max(1, len(adapters)),
        max_host_adapters=max(1, len(adapters)),
        max_rank=max_rank or max([MIN_RANK, *ranks]),
        precision=precision,
        max_length=max_length,
        template=template,
    )

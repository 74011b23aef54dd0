"""The interface of a stage: what it computes from a batch of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from raytune_llm.records import Batch, LossOut

StageLoss = Callable[[nn.Module, Batch], LossOut]
"""(model, batch) -> LossOut"""
AnswerLogprobs = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> [P, 2]: log-probabilities in nats of the two answers of each row (chosen and rejected, or the row's own and
the mismatched one), summed over their trained tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalStatistics:
    """Statistics of the global batch that a loss needs before it can be computed on a micro-batch.

    A first pass, without gradient and with the same dropout as the second, computes `values` for every row of a step. `reduce`
    computes columns from all of them, which the loss finds in batch.per_answer.
    """

    values: Callable[[nn.Module, Batch], Tensor]
    """(model, batch) -> [P, K]. It need not call the model."""
    reduce: Callable[[Tensor, Tensor], tuple[Mapping[str, Tensor], Tensor]]
    """(values of all rows [A, K], state) -> (columns by name, [A, ...] each, the state after this step)."""
    state: tuple[float, ...] = ()
    """The initial value of the state that is kept from step to step, and saved in checkpoints: float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A stage with its settings."""

    loss: StageLoss
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda means: {}
    """Metrics that are computed from the means of loss and metrics, such as the perplexity."""
    statistics: GlobalStatistics | None = None
    reference: AnswerLogprobs | None = None
    """The function that, called with the reference model, gives batch.per_answer["reference"]; None if the loss has no
    reference."""
    separate_head: bool = False
    """A Scorer is saved as a language model with a separate file for its head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    objective: Callable[[Any], Objective]
    """Makes the objective from the stage's section of the config."""
    scores: Callable[[nn.Module, Batch], Tensor] | None = None
    """(model, batch) -> [P, 2]: the scores of each pair's chosen and rejected answer; None if the model is not a Scorer."""

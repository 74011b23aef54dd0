"""What a stage computes from a batch of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from raytune_llm.records import Batch, LossOut

StageLoss = Callable[[nn.Module, Batch], LossOut]
"""(model, batch) -> LossOut"""
AnswerLogprobs = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> [P, 2]: log-probabilities in nats of the two answers of each row, summed over their trained tokens: of the
chosen and the rejected one, or of the row's own and the mismatched one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalStatistics:
    """Statistics of the global batch that a loss needs before it can be computed on a micro-batch.

    A first pass, without gradient and with dropout as in the second, takes `values` of every row of a step; what `reduce` makes
    of all of them comes to the loss in batch.per_answer.
    """

    values: Callable[[nn.Module, Batch], Tensor]
    """(model, batch) -> [P, K]. Need not call the model."""
    reduce: Callable[[Tensor, Tensor], tuple[Mapping[str, Tensor], Tensor]]
    """(values of all rows [A, K], state) -> (columns by name, [A, ...] each, the state after this step)."""
    state: tuple[float, ...] = ()
    """What is remembered from step to step, as it is before the first: float64, in checkpoints too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A stage with its settings."""

    loss: StageLoss
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda means: {}
    """What is reported beside the means of loss and metrics and follows from them: a perplexity, say."""
    statistics: GlobalStatistics | None = None
    reference: AnswerLogprobs | None = None
    """What batch.per_answer["reference"] holds when the loss sees the batch, if it is called with the reference model; none where
    the loss has no reference."""
    separate_head: bool = False
    """Where the model is a Scorer: it is saved as a language model, and its head beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    objective: Callable[[Any], Objective]
    """From the stage's section of the config."""
    scores: Callable[[nn.Module, Batch], Tensor] | None = None
    """(model, batch) -> [P, 2]: where the stage's model is a Scorer, what it gives to each pair's chosen and rejected answer."""

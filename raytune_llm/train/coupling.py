"""Losses that need to know the whole global batch before they can be computed on a part of it.

A first pass over the step's micro-batches, without gradient, takes some values of each row; they are put together in the order of
the step, so that nothing depends on how the step is split. What the stage makes of them goes with the batches into the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytune_llm.data.loader import Step
from raytune_llm.stages import GlobalStatistics


class Coupled:
    """A stage's coupling, and what it remembers from step to step."""

    def __init__(self, coupling: GlobalStatistics, remembered: Sequence[float] | None) -> None:
        """remembered: from a checkpoint; None at the start of a run."""
        self._coupling = coupling
        self._state = torch.tensor(coupling.state if remembered is None else remembered, dtype=torch.float64)

    def remembered(self) -> list[float]:
        return self._state.tolist()

    def attach(self, model: nn.Module, batches: Sequence[Any], step: Step, *, seed: int, remember: bool) -> list[Any]:
        """The step's batches, each with the part of the whole that is its rows'. All workers must call it together."""
        with torch.no_grad():
            parts = []
            for batch in batches:
                seed_dropout(seed, batch.sample_ids)
                parts.append(self._coupling.values(model, batch))
            whole_AK = parts[0].new_zeros(int(step.count), parts[0].shape[1])
            for first, part_PK in zip(step.first_rows, parts, strict=True):
                whole_AK[first : first + len(part_PK)] = part_PK
            if dist.is_initialized():
                dist.all_reduce(whole_AK)  # every row is one worker's: the others add zero
            columns, state = self._coupling.reduce(whole_AK, self._state.to(whole_AK.device))
        if remember:
            self._state = state
        spans = ((first, first + len(part)) for first, part in zip(step.first_rows, parts, strict=True))
        return [
            replace(batch, per_answer={**batch.per_answer, **{name: column[start:end] for name, column in columns.items()}})
            for batch, (start, end) in zip(batches, spans, strict=True)
        ]


def seed_dropout(seed: int, sample_ids: tuple[int, ...]) -> None:
    """Dropout is drawn from the step and the samples, so that a resumed run, or a second pass over a batch, draws the same."""
    torch.manual_seed(hash((seed, sample_ids)))

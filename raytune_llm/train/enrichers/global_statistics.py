"""Statistics of the global batch, for losses that can't be computed from one micro-batch.

A first pass over the step's micro-batches, without gradient, computes some values of each row. They are gathered in the order of
the step, so the result does not depend on how the step is split. The stage reduces them to statistics, which are added to the
batches for the second pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from raytune_llm.data.steps import Step
from raytune_llm.records import Batch
from raytune_llm.stages import GlobalStatistics
from raytune_llm.train.dropout import seed_dropout


class FirstPass:
    """A stage's global statistics, and their state."""

    phase = "first pass over the global batch"

    def __init__(self, statistics: GlobalStatistics) -> None:
        self._statistics = statistics
        self._state = torch.tensor(statistics.state, dtype=torch.float64)

    def attach(self, policy: nn.Module, batches: Sequence[Batch], step: Step) -> list[Batch]:
        with torch.no_grad():
            parts = []
            for batch in batches:
                seed_dropout(batch)
                parts.append(self._statistics.values(policy, batch))
            values_AK = parts[0].new_zeros(step.num_rows, parts[0].shape[1])
            for first, part_PK in zip(step.first_rows, parts, strict=True):
                values_AK[first : first + len(part_PK)] = part_PK
            if dist.is_initialized():
                dist.all_reduce(values_AK)  # each row belongs to one worker; the others have zeros there
            columns, state = self._statistics.reduce(values_AK, self._state.to(values_AK.device))
        if not step.held_out:
            self._state = state
        spans = ((first, first + len(part)) for first, part in zip(step.first_rows, parts, strict=True))
        return [
            batch.with_answers({name: column_A[start:end] for name, column_A in columns.items()})
            for batch, (start, end) in zip(batches, spans, strict=True)
        ]

    def state(self) -> list[float]:
        return self._state.tolist()

    def load(self, state: Sequence[float]) -> None:
        self._state = torch.tensor(state, dtype=torch.float64)

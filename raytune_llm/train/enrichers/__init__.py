"""Enrichers add columns to a batch that a loss needs and the rows don't have. They run in the order of a list.

To add one, write its file here and enter it in the list in runs/setup.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from raytune_llm.data.steps import Step
from raytune_llm.records import Batch
from raytune_llm.train.phases import phase


class Enricher(Protocol):
    @property
    def phase(self) -> str:
        """What it does, as a name in profiles."""
        ...

    def attach(self, policy: nn.Module, batches: Sequence[Batch], step: Step) -> list[Batch]:
        """This worker's micro-batches of the step with more columns. They are on the device and have the columns of earlier
        enrichers.

        All workers call it together. policy: the model as the strategy wraps it. A held-out step must not change the state.
        """
        ...

    def state(self) -> Any:
        """Its state as JSON, part of a checkpoint."""
        ...

    def load(self, state: Any) -> None:
        """Resume from a state that `state()` returned."""
        ...


def enriched(enrichers: Sequence[Enricher], policy: nn.Module, batches: Sequence[Batch], step: Step) -> list[Batch]:
    """The batches with the columns of all enrichers."""
    batches = list(batches)
    for enricher in enrichers:
        with phase(enricher.phase):
            batches = enricher.attach(policy, batches, step)
    return batches

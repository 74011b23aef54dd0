"""Enrichers add to a batch what a loss needs beside the rows, in the order of a list.

To add one: its file here, and its place in the list (runs/setup.py).
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
        """What it does, for profiles."""
        ...

    def attach(self, policy: nn.Module, batches: Sequence[Batch], step: Step) -> list[Batch]:
        """This worker's micro-batches of the step, each with more columns. They are on the device, and columns that enrichers
        before this one added are there.

        All workers call it together. A call of `policy` is a forward pass under the strategy. Nothing is remembered of a step
        that is held out.
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

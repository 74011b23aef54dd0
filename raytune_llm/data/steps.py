"""The data of optimizer steps, and the interface of their sources."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raytune_llm.records import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step of one rank. Everything but `batches` and `first_rows` is the same on all ranks."""

    epoch: int
    cursor: int
    """Samples of this epoch that are consumed after the step."""
    fraction: float
    """The fraction of the epoch that is done after the step: 1 at its end; 0 before, if its length is unknown."""
    batches: Sequence[Batch]
    """This rank's micro-batches, the same number on every rank; at the end of an epoch some may be padding only."""
    first_rows: Sequence[int]
    """For each micro-batch, the number of the step's rows before its own, over all ranks in the order of sample_ids."""
    num_rows: int
    """Rows of the step over all ranks."""
    count: int | float | None
    """The number that the step's loss is divided by, over all ranks and micro-batches: trained tokens times their weights, or
    pairs, or labelled rows. None: unknown until the batches are built; then the sum of Batch.count over ranks is used."""
    tokens: int
    """Tokens of the step over all ranks, without padding."""
    sample_ids: tuple[int, ...]
    """The samples of the step over all ranks, in order."""
    store: str = ""
    """The hash of the token store of its rows, if the store is complete."""
    held_out: bool = False
    """The step is for evaluation, so enrichers must not update their state."""

    @property
    def ends_epoch(self) -> bool:
        return self.fraction == 1.0


class Position(Protocol):
    """A run's position in its source of steps."""

    epoch: int
    cursor: int
    source_state: Mapping[str, Any]


class StepSource(Protocol):
    """A source of steps for the training loop: a store, a stream, or completions of the policy itself."""

    def steps(self, progress: Position, policy: Any) -> Generator[Step]:
        """An endless generator of the steps after `progress`, epoch after epoch. The loop closes it after the last step.

        A source that does not read the policy may prefetch them; one that does sees the policy after the previous step.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """The state, besides epoch and cursor, that is needed to resume after the last step, as JSON values. Checkpoints save it,
        and it comes back as progress.source_state."""
        ...

"""Steps, and where they come from."""

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
    """This rank's micro-batches, as many on each; some of an epoch's last ones may be padding only."""
    first_rows: Sequence[int]
    """Of each of them: how many of the step's rows, over all ranks and in the order of sample_ids, come before its own."""
    num_rows: int
    """Of the step, over all ranks."""
    count: int | float | None
    """What the step's loss is divided by, over all ranks and micro-batches: trained tokens by their weights, or pairs, or
    labelled rows. None if it is unknown before the batches are made: then it is the sum of Batch.count over ranks."""
    tokens: int
    """Real tokens of the step over all ranks."""
    sample_ids: tuple[int, ...]
    """The samples of the step over all ranks, in order."""
    store: str = ""
    """The hash of the token store of its rows, if the store is complete."""
    held_out: bool = False
    """It is evaluated, not learned from: nothing is remembered of it."""

    @property
    def ends_epoch(self) -> bool:
        return self.fraction == 1.0


class Position(Protocol):
    """Where a run stands in its source."""

    epoch: int
    cursor: int
    source_state: Mapping[str, Any]


class StepSource(Protocol):
    """What the loop consumes: a store, a stream, or answers of the policy itself."""

    def steps(self, progress: Position, policy: Any) -> Generator[Step]:
        """The steps after `progress`, epoch after epoch, without an end: the loop closes it when it has enough.

        A source that does not read the policy may prefetch them; one that does sees the policy after the previous step.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """What it must know beside epoch and cursor to resume after the step it gave last, as JSON: part of a checkpoint, and
        back as progress.source_state."""
        ...

from __future__ import annotations

from typing import Literal

from raytune_llm.config.section import PositiveInt, section


@section
class CheckpointConfig:
    every_steps: PositiveInt | None
    """Steps between checkpoints; null: one at the end of each epoch."""
    keep: PositiveInt
    """Number of newest checkpoints to keep (and the best one, if final=best)."""
    asynchronous: bool
    """Write checkpoints while training continues."""
    final: Literal["last", "best"]
    """Which weights become `final/`: those of the last step, or those with the lowest eval loss."""

    @property
    def keeps_best(self) -> bool:
        return self.final == "best"

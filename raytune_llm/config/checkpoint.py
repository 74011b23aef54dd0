from __future__ import annotations

from typing import Literal

from raytune_llm.config.section import PositiveInt, section


@section
class CheckpointConfig:
    every_steps: PositiveInt | None
    """none: one at each epoch's end."""
    keep: PositiveInt
    """The newest so many stay on disk (the best one as well where final=best)."""
    asynchronous: bool
    """Write checkpoints while training continues."""
    final: Literal["last", "best"]
    """Which state becomes `final/`: the last, or the one with the lowest eval loss."""

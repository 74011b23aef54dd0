"""The result of a run. It does not import torch, since the driver and the inbox handle it."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_llm.train.progress import Progress


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """The result of a run, from the worker with rank 0."""

    progress: Progress
    world_size: int
    tokens_per_s: float | None
    mfu: float | None
    peak_memory_gib: float
    load_s: float
    train_s: float
    save_s: float
    yielded: bool = False
    """The group ended before the last step with a checkpoint, so that another group can resume."""
    paused: bool
    """The run stopped at train.pause_at: there is a checkpoint and no final/."""

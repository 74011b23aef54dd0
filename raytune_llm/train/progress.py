"""The progress of a run, as checkpoints store it. It does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Progress:
    """The state of a run after a step. With the config and the manifest it determines all later steps."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    """Samples of this epoch that were consumed."""
    tokens_seen: int = 0
    nonfinite_steps: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    best_score: float | None = None
    """The best early_stopping_metric so far, negated if higher is better."""
    evals_without_gain: int = 0
    source_state: Mapping[str, Any] = field(default_factory=dict)
    """The state of the source of steps, in addition to epoch and cursor."""
    enricher_states: list[Any] = field(default_factory=list)
    """The state of each enricher, in order."""
    window: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Sums and counts since the last log step."""
    loss_first: float | None = None
    loss_last: float | None = None

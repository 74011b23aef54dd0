"""What a format of `export` must say before anything is written, and do then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raytune_llm.export.rows import Rows

OnBytes = Callable[[int], None]
"""Called with the size of each tensor as it is written."""


@dataclass(frozen=True)
class Target:
    num_bytes: int
    """The size of the weights on disk."""
    write: Callable[[Path, OnBytes], None]
    """All files but the card, into a folder that is there. Raises ConfigError where a value doesn't fit."""
    outputs: Callable[[Path, Rows, torch.device], Iterator[Tensor]]
    """The outputs of what was written, in float32 on that device, as tensors of the CPU: for each row log-probabilities
    [T - 1, V], or a reward model's score [1]."""
    library: str
    """That loads it, as a hub's cards name it."""
    dtype: str
    """The type of the weights, for the card."""
    max_kl: float = 0.01
    """Where export.max_kl is null."""
    passing_bytes: int = 0
    """On disk beside them, while it is written."""
    merges: bool = True
    """The adapter is in the weights; False: it is written alone, for a base that the reader has."""
    notes: str = ""
    """The last part of the card."""

"""The interface of export formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raytune_llm.export.rows import Rows

OnBytes = Callable[[int], None]
"""Called with the size in bytes of each tensor that was written."""


@dataclass(frozen=True)
class Target:
    num_bytes: int
    """The size of the weights on disk."""
    write: Callable[[Path, OnBytes], None]
    """Writes all files except the card into an existing folder. Raises ConfigError if a value doesn't fit the dtype."""
    outputs: Callable[[Path, Rows, torch.device], Iterator[Tensor]]
    """The export's outputs, computed in float32 on the device and returned on the CPU: for each row, log-probabilities [T - 1,
    V], or a reward model's score [1]."""
    library: str
    """The library that loads it, for `library_name` on the card."""
    dtype: str
    """The dtype of the weights, for the card."""
    max_kl: float = 0.01
    """The default of export.max_kl, in nats per token."""
    passing_bytes: int = 0
    """The additional disk space in bytes that writing needs."""
    merges: bool = True
    """Whether the adapter is merged; False: the export is the adapter alone."""
    notes: str = ""
    """The last section of the card."""

"""Whether a tensor has only numbers in it."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """By its extremes, which are NaN if any value is: on CPUs several times faster than `isfinite` of each value."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())

"""Checks tensors for NaN and infinities."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. It checks the minimum and maximum, which are NaN if any value is; on CPUs this is several
    times faster than `isfinite` of each value."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())

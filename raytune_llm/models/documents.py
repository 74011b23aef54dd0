"""Where the documents of a batch lie."""

from __future__ import annotations

import torch
from torch import Tensor


def document_numbers(cu_seqlens_S: Tensor, B: int, T: int) -> Tensor:
    """[B, T]: which document each position is in, counted over the batch."""
    flat = torch.arange(B * T, device=cu_seqlens_S.device)
    return torch.searchsorted(cu_seqlens_S.long(), flat, right=True).view(B, T)

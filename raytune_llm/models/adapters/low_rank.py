"""Adds products of low rank to a weight, some rows at a time, so that what is made of them stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_VALUES = 2**20
"""Of the weight, at a time: 4 MiB in float32."""


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to a weight [O, K]: scale * B A (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

    b_OR: Tensor
    """With the scale in it, in float32."""
    a_RK: Tensor
    """In float32."""


@torch.no_grad()
def added(weight_OK: Tensor, terms: Sequence[LowRank], converted: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight plus all terms, summed in float32. converted: from float32 to the type of the result. Where that is the weight's
    own, the result is in its memory."""
    rows = max(1, BLOCK_VALUES // weight_OK.shape[1])
    made_OK: Tensor | None = None
    for first in range(0, len(weight_OK), rows):
        part = slice(first, first + rows)
        sum_NK = weight_OK[part].to(torch.float32, copy=True)
        for term in terms:
            sum_NK.addmm_(term.b_OR[part], term.a_RK)
        narrow_NK = converted(sum_NK)
        if made_OK is None:
            own = narrow_NK.dtype == weight_OK.dtype
            made_OK = weight_OK if own else torch.empty(weight_OK.shape, dtype=narrow_NK.dtype)
        made_OK[part] = narrow_NK
    return weight_OK if made_OK is None else made_OK

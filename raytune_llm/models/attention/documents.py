"""The boundaries of the documents in a batch, and masks that keep attention within them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from raytune_llm.records import Prefixes


def document_numbers(cu_seqlens_S: Tensor, B: int, T: int) -> Tensor:
    """[B, T]: which document each position is in, counted over the batch."""
    flat = torch.arange(B * T, device=cu_seqlens_S.device)
    return torch.searchsorted(cu_seqlens_S.long(), flat, right=True).view(B, T)


def prefix_bounds(prefixes: Prefixes, B: int, T: int) -> tuple[Tensor, Tensor]:
    """[B, T] each: start and end, in the row, of the shared prompt of each position's document; 0 and 0 if it has none."""
    lengths_X = prefixes.cu_queries_X.diff()
    firsts_X, lasts_X = (prefixes.keys_K[places.long()] % T for places in (prefixes.cu_keys_X[:-1], prefixes.cu_keys_X[1:] - 1))
    first_L, end_L = (
        torch.zeros(B * T, dtype=torch.int64, device=lengths_X.device).index_copy(
            0, prefixes.queries_Q, bounds_X.repeat_interleave(lengths_X, output_size=len(prefixes.queries_Q))
        )
        for bounds_X in (firsts_X, lasts_X + 1)
    )
    return first_L.view(B, T), end_L.view(B, T)


def document_mask(
    cu_seqlens_S: Tensor, B: int, T: int, sliding_window: int | None = None, prefixes: Prefixes | None = None
) -> Tensor:
    """[B, 1, T, T], true where position i may see position j: same document, j not after i, and within the window; or j is among
    the shared prompt of i's document."""
    document_BT = document_numbers(cu_seqlens_S, B, T)
    i, j = torch.arange(T, device=document_BT.device)[:, None], torch.arange(T, device=document_BT.device)[None, :]
    mask = (document_BT[:, :, None] == document_BT[:, None, :]) & (j <= i)
    if sliding_window is not None:
        mask &= i - j < sliding_window
    if prefixes is not None:
        first_BT, end_BT = prefix_bounds(prefixes, B, T)
        mask |= (j >= first_BT[:, :, None]) & (j < end_BT[:, :, None])
    return mask[:, None]


def block_masks(
    cu_seqlens_S: Tensor, B: int, T: int, window: int | None, prefixes: Prefixes | None = None
) -> dict[int, BlockMask]:
    """The same by blocks, of which empty ones are left out: without a window, as 0, and with the model's."""
    document_BT = document_numbers(cu_seqlens_S, B, T)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document_BT[b, i] == document_BT[b, j]) & (j <= i)

    if prefixes is not None:
        first_BT, end_BT = prefix_bounds(prefixes, B, T)
        seen = partial(_seen_before, seen, first_BT, end_BT)
    build: Any = create_block_mask
    device = cu_seqlens_S.device.type
    masks = {0: build(seen, B, None, T, T, device=device)}
    if window is not None:
        near = partial(_seen_in_window, seen, window)
        masks[window] = build(near, B, None, T, T, device=device)
    return masks


def _seen_before(
    seen: Callable[..., Tensor], first_BT: Tensor, end_BT: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    return seen(b, h, i, j) | ((j >= first_BT[b, i]) & (j < end_BT[b, i]))


def _seen_in_window(seen: Callable[..., Tensor], window: int, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen(b, h, i, j) & (i - j < window)

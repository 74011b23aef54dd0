"""Where the documents of a batch lie, and the masks that keep them apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from raytune_llm.records import Prefixes

BLOCK = 128
"""Positions to a side of a block, as FlexAttention has them by itself."""


def document_numbers(cu_seqlens_S: Tensor, B: int, T: int) -> Tensor:
    """[B, T]: which document each position is in, counted over the batch."""
    flat = torch.arange(B * T, device=cu_seqlens_S.device)
    return torch.searchsorted(cu_seqlens_S.long(), flat, right=True).view(B, T)


def prefix_bounds(prefixes: Prefixes, B: int, T: int) -> tuple[Tensor, Tensor]:
    """[B, T] each: first and end, in the row, of what each position's document goes on from; 0 and 0 where it does not."""
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
    what i's document goes on from."""
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

    bounds = None
    if prefixes is not None:
        bounds = prefix_bounds(prefixes, B, T)
        seen = partial(_seen_before, seen, *bounds)
    masks = {0: _by_blocks(seen, document_BT, T, bounds)}
    if window is not None:
        masks[window] = _by_blocks(partial(_seen_in_window, seen, window), document_BT, window, bounds)
    return masks


def _by_blocks(seen: Callable[..., Tensor], document_BT: Tensor, window: int, bounds: tuple[Tensor, Tensor] | None) -> BlockMask:
    """`seen` with the blocks that it is true in, for some positions or for all.

    They follow from where blocks begin and end, since documents have no gaps; nothing is as large as the square of T. What
    documents go on from is taken by blocks of queries as one range, in which `seen` finds what is meant.
    """
    T = document_BT.shape[1]
    first_N = torch.arange(0, T, BLOCK, device=document_BT.device)
    last_N = (first_N + BLOCK - 1).clamp(max=T - 1)
    # The nearest pair of a block of queries [N, 1] and an earlier one of keys [N], and the pair that is farthest apart.
    nearest_BNN = document_BT[:, first_N, None] == document_BT[:, None, last_N]
    farthest_BNN = document_BT[:, last_N, None] == document_BT[:, None, first_N]
    earlier_NN = first_N[:, None] > first_N
    some_BNN = nearest_BNN & earlier_NN & (first_N[:, None] - last_N < window) | (first_N[:, None] == first_N)
    whole_N1 = (last_N - first_N == BLOCK - 1)[:, None]
    all_BNN = farthest_BNN & earlier_NN & (last_N[:, None] - first_N < window) & whole_N1
    if bounds is not None:
        rest, (first_BT, end_BT) = (0, -T % BLOCK), bounds
        first_BT = first_BT.masked_fill(end_BT == 0, T)
        least_BN1 = F.pad(first_BT, rest, value=T).unflatten(1, (-1, BLOCK)).amin(2, keepdim=True)
        most_BN1 = F.pad(end_BT, rest).unflatten(1, (-1, BLOCK)).amax(2, keepdim=True)
        some_BNN |= (least_BN1 <= last_N) & (first_N < most_BN1)
    return BlockMask.from_kv_blocks(
        *_ordered(some_BNN & ~all_BNN), *_ordered(all_BNN), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(T, T)
    )


def _ordered(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and which: these, in order, come before the others."""
    blocks = blocks_BNN[:, None].int()
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()


def _seen_before(
    seen: Callable[..., Tensor], first_BT: Tensor, end_BT: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    return seen(b, h, i, j) | ((j >= first_BT[b, i]) & (j < end_BT[b, i]))


def _seen_in_window(seen: Callable[..., Tensor], window: int, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen(b, h, i, j) & (i - j < window)

"""The kernels behind `paged_decode`. A step's numbers, int32 end to end: see `DecodeStep`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, WARPS = 64, 4
"""Tokens of a row that a program reads at once, and its warps."""


def write(k_RKD: Tensor, v_RKD: Tensor, keys: Tensor, values: Tensor, layer_1: Tensor, step: Tensor, columns: int) -> None:
    """The new keys and values, to their places; rows without a place are padding."""
    width = k_RKD[0].numel()
    kernel: Any = _write
    kernel[(len(k_RKD),)](
        k_RKD, v_RKD, keys, values, layer_1, step, columns, keys.stride(0), width,
        WIDTH=triton.next_power_of_2(width), num_warps=WARPS,
    )  # fmt: skip


def attend(
    q_RHD: Tensor,
    keys: Tensor,
    values: Tensor,
    layer_1: Tensor,
    step: Tensor,
    columns: int,
    scaling: float,
    window: int,
    softcap: float,
    splits: int,
) -> Tensor:
    R, H, D = q_RHD.shape
    heads = keys.shape[3]
    groups = H // heads
    out = torch.empty_like(q_RHD)
    parts = q_RHD.new_empty((R, H, splits, D), dtype=torch.float32) if splits > 1 else out
    sums = q_RHD.new_empty((R, H, splits, 2), dtype=torch.float32) if splits > 1 else out
    kernel, reduce = (_attend, _reduce)
    sizes = {"WIDTH": triton.next_power_of_2(D), "num_warps": WARPS}
    launched: Any = kernel[(R, heads, splits)]
    launched(
        q_RHD, keys, values, layer_1, step, out, parts, sums, columns, keys.stride(0), keys.shape[2], scaling, window, softcap,
        D=D, HEADS=heads, GROUPS=groups, SPLITS=splits, PADDED=max(16, triton.next_power_of_2(groups)), TOKENS=TOKENS,
        CAPPED=softcap > 0, EXACT=q_RHD.dtype == torch.float32, **sizes,
    )  # fmt: skip
    if splits > 1:
        launched = reduce[(R, H)]
        launched(parts, sums, out, D=D, SPLITS=splits, PADDED=triton.next_power_of_2(splits), **sizes)
    return out


@triton.jit
def _write(k, v, keys, values, layer, step, columns, layer_stride, width, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    place = tl.load(step + 1 + 2 * columns + row)
    if place >= 0:
        i = tl.arange(0, WIDTH)
        inside = i < width
        to = tl.load(layer).to(tl.int64) * layer_stride + place.to(tl.int64) * width + i
        tl.store(keys + to, tl.load(k + row * width + i, mask=inside).to(keys.dtype.element_ty), mask=inside)
        tl.store(values + to, tl.load(v + row * width + i, mask=inside).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    q, keys, values, layer, step, out, parts, sums, columns, layer_stride, block_size, scaling, window, softcap,
    D: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    table = step + 1 + 5 * columns + row * tl.load(step)
    length = tl.load(step + 1 + 3 * columns + row)
    first = tl.maximum(length - window, 0) if window > 0 else 0
    share = tl.cdiv(tl.cdiv(length - first, TOKENS), SPLITS) * TOKENS
    start = first + split * share
    end = tl.minimum(start + share, length)
    base = tl.load(layer).to(tl.int64) * layer_stride
    g, d, t = tl.arange(0, PADDED), tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    from_q = (row * HEADS * GROUPS + head * GROUPS + g[:, None]) * D + d[None, :]
    of_q = (g[:, None] < GROUPS) & (d[None, :] < D)
    query = tl.load(q + from_q, mask=of_q, other=0.0)
    highest = tl.full([PADDED], -float("inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    gathered = tl.zeros([PADDED, WIDTH], tl.float32)
    for at in range(start, end, TOKENS):
        token = at + t
        seen = token < end
        block = tl.load(table + token // block_size, mask=seen, other=0).to(tl.int64)
        place = base + ((block * block_size + token % block_size) * HEADS + head) * D
        inside = seen[:, None] & (d[None, :] < D)
        key = tl.load(keys + place[:, None] + d[None, :], mask=inside, other=0.0)
        value = tl.load(values + place[:, None] + d[None, :], mask=inside, other=0.0)
        if EXACT:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        else:
            scores = tl.dot(query, tl.trans(key)) * scaling
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        if EXACT:
            gathered = gathered * shrink[:, None] + tl.dot(weights, value, input_precision="ieee")
        else:
            gathered = gathered * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        highest = higher
    if SPLITS == 1:
        result = gathered / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + from_q, result.to(out.dtype.element_ty), mask=of_q)
    else:
        lane = (row * HEADS * GROUPS + head * GROUPS + g) * SPLITS + split
        tl.store(parts + lane[:, None] * D + d[None, :], gathered, mask=of_q)
        tl.store(sums + lane * 2, highest, mask=g < GROUPS)
        tl.store(sums + lane * 2 + 1, total, mask=g < GROUPS)


@triton.jit
def _reduce(parts, sums, out, D: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    lane = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    s, d = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    there = s < SPLITS
    highest = tl.load(sums + (lane * SPLITS + s) * 2, mask=there, other=-float("inf"))
    total = tl.load(sums + (lane * SPLITS + s) * 2 + 1, mask=there, other=0.0)
    # A part without tokens counts nothing; a row without any is padding.
    shrink = tl.where(total > 0, tl.exp(highest - tl.max(highest, 0)), 0.0)
    part = tl.load(parts + (lane * SPLITS + s[:, None]) * D + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0)
    gathered = tl.sum(tl.where(total[:, None] > 0, part, 0.0) * shrink[:, None], 0)
    whole = tl.sum(total * shrink, 0)
    tl.store(out + lane * D + d, (gathered / tl.where(whole > 0, whole, 1.0)).to(out.dtype.element_ty), mask=d < D)  # type: ignore[operator]

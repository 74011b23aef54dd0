"""Attention of one new token a row over a paged cache, on a GPU, in Triton.

A program takes one row, one head of keys and a part of the row's tokens, with the query heads that share those keys as rows of
its products; what it finds is merged with the other parts by the log-sum-exp of their scores (flash decoding, Dao et al. 2023).
How many parts there are depends on the number of rows alone, and where they lie on lengths that the device reads, so a CUDA graph
may hold the launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from raytune_llm.models.attention.masked import Scores

TILE = 64
"""Tokens that a program reads at once."""
PROGRAMS = 512
"""That a launch is split into, where rows and heads alone are fewer: about four for each multiprocessor of an H100."""
MAX_PARTS = 64


def paged_decoding(
    q_RHD: Tensor,
    keys: Tensor,
    values: Tensor,
    tables_RK: Tensor,
    lengths_R: Tensor,
    scores: Scores,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[R, H, Dv]: the last token of each row over its tokens. keys, values: [blocks, block_size, heads, Dh] each, Dv of values
    may differ. tables_RK, lengths_R: int32."""
    R, H, head = q_RHD.shape
    heads, head_v = keys.shape[2], values.shape[3]
    parts = max(1, min(MAX_PARTS, PROGRAMS // (R * heads)))
    q_RHD = q_RHD.contiguous()
    out_RHV = q_RHD.new_empty(R, H, head_v)
    part_RHPV = torch.empty(R, H, parts, head_v, device=q_RHD.device, dtype=torch.float32)
    lse_RHP = torch.empty(R, H, parts, device=q_RHD.device, dtype=torch.float32)
    attend: Any = _attend
    attend[(R, heads, parts)](
        part_RHPV, lse_RHP, q_RHD, keys, values, tables_RK, lengths_R,
        head**-0.5 if scores.scaling is None else scores.scaling,
        scores.softcap or 0.0,
        tables_RK.stride(0),
        keys.stride(0), keys.stride(1), keys.stride(2),
        values.stride(0), values.stride(1), values.stride(2),
        HEADS=H, GROUP=H // heads, PADDED_GROUP=max(16, triton.next_power_of_2(H // heads)),
        HEAD=head, PADDED_HEAD=max(16, triton.next_power_of_2(head)),
        HEAD_V=head_v, PADDED_HEAD_V=max(16, triton.next_power_of_2(head_v)),
        BLOCK_SIZE=keys.shape[1], WINDOW=scores.sliding_window or 0, CAPPED=scores.softcap is not None,
        PARTS=parts, TILE=TILE, num_warps=4,
    )  # fmt: skip
    merge: Any = _merge
    merge[(R, H)](
        out_RHV, part_RHPV, lse_RHP, lse_RHP if sinks_H is None else sinks_H,
        HAS_SINKS=sinks_H is not None, HEADS=H, HEAD_V=head_v, PADDED_HEAD_V=triton.next_power_of_2(head_v),
        PARTS=parts, PADDED_PARTS=triton.next_power_of_2(parts), num_warps=2,
    )  # fmt: skip
    return out_RHV


@triton.jit
def _attend(
    part_out, part_lse, queries, keys, values, tables, lengths, scaling, softcap, table_stride,
    key_block, key_token, key_head, value_block, value_token, value_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, HEAD: tl.constexpr, PADDED_HEAD: tl.constexpr,
    HEAD_V: tl.constexpr, PADDED_HEAD_V: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    size = tl.cdiv(tl.cdiv(length - first, PARTS), TILE) * TILE
    start = first + part * size
    stop = tl.minimum(start + size, length)

    g = tl.arange(0, PADDED_GROUP)
    d = tl.arange(0, PADDED_HEAD)
    v = tl.arange(0, PADDED_HEAD_V)
    t = tl.arange(0, TILE)
    of_group = g < GROUP
    query_head = row * HEADS + head * GROUP + g
    q = tl.load(queries + query_head[:, None] * HEAD + d[None, :], mask=of_group[:, None] & (d < HEAD)[None, :], other=0.0)
    best = tl.full([PADDED_GROUP], -1e30, tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    out = tl.zeros([PADDED_GROUP, PADDED_HEAD_V], tl.float32)
    for at in range(start, stop, TILE):
        position = at + t
        inside = position < stop
        block = tl.load(tables + row * table_stride + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        token = position % BLOCK_SIZE
        key_at = block * key_block + token * key_token + head * key_head
        k = tl.load(keys + key_at[None, :] + d[:, None], mask=inside[None, :] & (d < HEAD)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scaling
        if CAPPED:
            score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))  # tanh
        score = tl.where(inside[None, :], score, -1e30)
        now = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.where(inside[None, :], tl.exp(score - now[:, None]), 0.0)
        keep = tl.exp(best - now)
        total = total * keep + tl.sum(weight, axis=1)
        value_at = block * value_block + token * value_token + head * value_head
        value = tl.load(values + value_at[:, None] + v[None, :], mask=inside[:, None] & (v < HEAD_V)[None, :], other=0.0)
        out = out * keep[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        best = now
    place = query_head * PARTS + part
    found = total > 0
    out = out / tl.where(found, total, 1.0)[:, None]
    tl.store(part_out + place[:, None] * HEAD_V + v[None, :], out, mask=of_group[:, None] & (v < HEAD_V)[None, :])
    tl.store(part_lse + place, tl.where(found, best + tl.log(tl.where(found, total, 1.0)), -1e30), mask=of_group)


@triton.jit
def _merge(
    out, part_out, part_lse, sinks,
    HAS_SINKS: tl.constexpr, HEADS: tl.constexpr, HEAD_V: tl.constexpr, PADDED_HEAD_V: tl.constexpr,
    PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    p = tl.arange(0, PADDED_PARTS)
    v = tl.arange(0, PADDED_HEAD_V)
    place = (row * HEADS + head) * PARTS + p
    lse = tl.load(part_lse + place, mask=p < PARTS, other=-1e30)
    best = tl.max(lse, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        best = tl.maximum(best, sink)
    weight = tl.exp(lse - best)
    total = tl.sum(weight, axis=0)
    if HAS_SINKS:
        total += tl.exp(sink - best)
    inside = (p < PARTS)[:, None] & (v < HEAD_V)[None, :]
    parts = tl.load(part_out + place[:, None] * HEAD_V + v[None, :], mask=inside, other=0.0)
    merged = tl.sum(parts * (weight / total)[:, None], axis=0)
    tl.store(out + (row * HEADS + head) * HEAD_V + v, merged.to(out.dtype.element_ty), mask=v < HEAD_V)

"""The Triton kernels of `slot_products` for many rows: the adapters' part of decoding rows and of prompts, one tile of rows per
program.

Rows are sorted by slot, so that a tile has few different slots. For each of these, the tile's rows are multiplied by the slot's
matrix, which is read once. Sums are in float32. For few rows, slot_kernels.py is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raytune_llm.models.adapters.slot_kernels import TOGETHER


class Tiles(NamedTuple):
    rows: int
    """The rows of a tile."""
    inputs: int
    """The inputs that one program handles."""
    step: int
    """The inputs per iteration."""
    outputs: int
    """The outputs of one program."""
    warps: int


MANY_ROWS = 1024
SMALL, LARGE = Tiles(16, 256, 128, 256, 4), Tiles(32, 2048, 128, 128, 4)
"""Up to MANY_ROWS rows, small tiles, since large ones would be too few programs; above it, large ones, which read less twice."""


def products(
    outs: Sequence[Tensor], x_TK: Tensor, slot_T: Tensor, order_T: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    """out + (x @ a[slot].T) @ b[slot] for each layer. a: [G, R, K] and b: [G, R, O] of each layer, contiguous. Slot -1 adds
    nothing. `outs` may be columns of one tensor. order_T: row indices sorted by slot."""
    (T, K), R, L = x_TK.shape, a[0].shape[1], len(outs)
    tile = SMALL if T <= MANY_ROWS else LARGE
    pieces, tiles, more = triton.cdiv(K, tile.inputs), triton.cdiv(T, tile.rows), TOGETHER - L
    low = x_TK.new_empty((T, L, pieces, R), dtype=torch.float32)
    into = [torch.empty_like(out, memory_format=torch.contiguous_format) for out in outs]
    widths = [out.shape[1] for out in outs]
    blocks = [triton.cdiv(width, tile.outputs) for width in widths]
    common = {"L": L, "R": R, "RANK": max(16, triton.next_power_of_2(R)), "PIECES": pieces, "ROWS": tile.rows}
    common |= {"EXACT": x_TK.dtype == torch.float32, "num_warps": tile.warps}
    narrow: Any = _narrow
    narrow[(tiles, L, pieces)](x_TK, slot_T, order_T, low, *a, *[a[0]] * more, T, K, INPUTS=tile.inputs, STEP=tile.step, **common)
    wide: Any = _wide
    wide[(tiles, sum(blocks))](
        low, slot_T, order_T, *into, *[into[0]] * more, *outs, *[outs[0]] * more, *b, *[b[0]] * more,
        *widths, *[0] * more, *(blocks + [0] * more)[:2], *[out.stride(0) for out in outs], *[0] * more, T,
        OUTPUTS=tile.outputs, **common,
    )  # fmt: skip
    return into


@triton.jit(do_not_specialize=["T"])  # compiled once for steps of any length
def _narrow(
    x, slots, order, low, a0, a1, a2, T, K, L: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, PIECES: tl.constexpr,
    ROWS: tl.constexpr, EXACT: tl.constexpr, INPUTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, layer, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tile * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + place, mask=place < T, other=0).to(tl.int64)
    slot = tl.load(slots + row, mask=place < T, other=-1)
    a = a0
    if layer == 1:
        a = a1
    if layer == 2:
        a = a2
    r, k = tl.arange(0, RANK), tl.arange(0, STEP)
    total = tl.zeros([ROWS, RANK], tl.float32)
    current = tl.max(slot, 0)
    while current >= 0:  # type: ignore[operator]
        mine = slot == current
        own = a + current.to(tl.int64) * R * K  # type: ignore[union-attr]
        for at in range(piece * INPUTS, piece * INPUTS + INPUTS, STEP):
            column = at + k
            inside = column < K
            values = tl.load(x + row[:, None] * K + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
            part = tl.load(own + r[None, :] * K + column[:, None], mask=(r[None, :] < R) & inside[:, None], other=0.0)
            total = tl.dot(values, part, total, input_precision="ieee") if EXACT else tl.dot(values, part, total)
        current = tl.max(tl.where(slot < current, slot, -1), 0)
    to = low + ((row[:, None] * L + layer) * PIECES + piece) * R + r[None, :]
    tl.store(to, total, mask=(slot[:, None] >= 0) & (r[None, :] < R))


@triton.jit(do_not_specialize=["T"])  # compiled once for steps of any length
def _wide(
    low, slots, order, into0, into1, into2, out0, out1, out2, b0, b1, b2, width0, width1, width2, blocks0, blocks1,
    stride0, stride1, stride2, T, L: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
    EXACT: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    into, out, b, width, stride, layer = into0, out0, b0, width0, stride0, 0
    if block >= blocks0:
        into, out, b, width, stride, layer = into1, out1, b1, width1, stride1, 1
        block -= blocks0
        if block >= blocks1:
            into, out, b, width, stride, layer = into2, out2, b2, width2, stride2, 2
            block -= blocks1
    place = tile * ROWS + tl.arange(0, ROWS)
    there = place < T
    row = tl.load(order + place, mask=there, other=0).to(tl.int64)
    slot = tl.load(slots + row, mask=there, other=-1)
    r, o = tl.arange(0, RANK), block * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = o < width
    narrow = tl.zeros([ROWS, RANK], tl.float32)
    for piece in range(PIECES):
        at = low + ((row[:, None] * L + layer) * PIECES + piece) * R + r[None, :]
        narrow += tl.load(at, mask=(slot[:, None] >= 0) & (r[None, :] < R), other=0.0)
    before = tl.load(out + row[:, None] * stride + o[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    total = before.to(tl.float32)
    current = tl.max(slot, 0)
    while current >= 0:  # type: ignore[operator]
        own_b = b + current.to(tl.int64) * R * width  # type: ignore[union-attr]
        part = tl.load(own_b + r[:, None] * width + o[None, :], mask=(r[:, None] < R) & inside[None, :], other=0.0)
        own = tl.where((slot == current)[:, None], narrow, 0.0)
        total = tl.dot(own, part, total, input_precision="ieee") if EXACT else tl.dot(own.to(part.dtype), part, total)
        current = tl.max(tl.where(slot < current, slot, -1), 0)
    value = tl.where((slot >= 0)[:, None], total.to(before.dtype), before)
    tl.store(into + row[:, None] * width + o[None, :], value, mask=there[:, None] & inside[None, :])

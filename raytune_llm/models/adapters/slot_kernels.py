"""The Triton kernels of `slot_products` for few rows: the adapters' part of decoding rows, one row per program.

The product of one row with a low-rank matrix is bound by reading the matrix, so each row reads only its own adapter's. The first
kernel computes x @ a[slot].T for the layers that share x, in parts of K. For each block of outputs, the second one sums these
parts and multiplies them by b[slot]. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INPUTS, OUTPUTS, WARPS = 512, 512, 4
"""The inputs and outputs that one program handles, and its warps."""
TOGETHER = 3
"""The largest number of layers that share an input: q, k and v."""


def products(outs: Sequence[Tensor], x_TK: Tensor, slot_T: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """out + (x @ a[slot].T) @ b[slot] for each layer. a: [G, R, K] and b: [G, R, O] of each layer, contiguous. Slot -1 adds
    nothing. `outs` may be columns of one tensor."""
    (T, K), R, L = x_TK.shape, a[0].shape[1], len(outs)
    pieces = triton.cdiv(K, INPUTS)
    low = x_TK.new_empty((T, L, pieces, R), dtype=torch.float32)
    into = [torch.empty_like(out, memory_format=torch.contiguous_format) for out in outs]
    widths = [out.shape[1] for out in outs]
    blocks = [triton.cdiv(width, OUTPUTS) for width in widths]
    more = TOGETHER - L
    common = {"L": L, "R": R, "RANK": triton.next_power_of_2(R), "PIECES": pieces, "num_warps": WARPS}
    narrow: Any = _narrow
    narrow[(T, L, pieces)](x_TK, slot_T, low, *a, *[a[0]] * more, K, INPUTS=INPUTS, STEP=_step(R), **common)
    wide: Any = _wide
    wide[(T, sum(blocks))](
        low, slot_T, *into, *[into[0]] * more, *outs, *[outs[0]] * more, *b, *[b[0]] * more,
        *widths, *[0] * more, *(blocks + [0] * more)[:2], *[out.stride(0) for out in outs], *[0] * more,
        OUTPUTS=OUTPUTS, PADDED=triton.next_power_of_2(pieces), **common,
    )  # fmt: skip
    return into


def _step(rank: int) -> int:
    """The number of inputs per iteration, such that a tile of `a` fits the registers."""
    return min(INPUTS, max(64, 8192 // triton.next_power_of_2(rank)))


@triton.jit
def _narrow(
    x, slots, low, a0, a1, a2, K, L: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, PIECES: tl.constexpr,
    INPUTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row, layer, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        a = a0
        if layer == 1:
            a = a1
        if layer == 2:
            a = a2
        r, k = tl.arange(0, RANK), tl.arange(0, STEP)
        total = tl.zeros([RANK], tl.float32)
        for at in range(piece * INPUTS, piece * INPUTS + INPUTS, STEP):
            column = at + k
            inside = column < K
            values = tl.load(x + row.to(tl.int64) * K + column, mask=inside, other=0.0).to(tl.float32)
            tile = tl.load(
                a + slot * R * K + r[:, None] * K + column[None, :], mask=(r[:, None] < R) & inside[None, :], other=0.0
            ).to(tl.float32)
            total += tl.sum(tile * values[None, :], 1)
        tl.store(low + ((row * L + layer) * PIECES + piece) * R + r, total, mask=r < R)


@triton.jit
def _wide(
    low, slots, into0, into1, into2, out0, out1, out2, b0, b1, b2, width0, width1, width2, blocks0, blocks1,
    stride0, stride1, stride2, L: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, PIECES: tl.constexpr,
    OUTPUTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    into, out, b, width, stride, layer = into0, out0, b0, width0, stride0, 0
    if block >= blocks0:
        into, out, b, width, stride, layer = into1, out1, b1, width1, stride1, 1
        block -= blocks0
        if block >= blocks1:
            into, out, b, width, stride, layer = into2, out2, b2, width2, stride2, 2
            block -= blocks1
    slot = tl.load(slots + row).to(tl.int64)
    o = block * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = o < width
    value = tl.load(out + row * stride + o, mask=inside, other=0.0)
    if slot >= 0:
        r, p = tl.arange(0, RANK), tl.arange(0, PADDED)
        parts = tl.load(
            low + ((row * L + layer) * PIECES + p[:, None]) * R + r[None, :], mask=(p[:, None] < PIECES) & (r[None, :] < R),
            other=0.0,
        )  # fmt: skip
        narrow = tl.sum(parts, 0)
        tile = tl.load(
            b + slot * R * width + r[:, None] * width + o[None, :], mask=(r[:, None] < R) & inside[None, :], other=0.0
        ).to(tl.float32)
        value = (value.to(tl.float32) + tl.sum(tile * narrow[:, None], 0)).to(value.dtype)  # type: ignore[index]
    tl.store(into + row * width + o, value, mask=inside)

"""The Triton kernels of `gated`. Each program computes one tile of the activations, and reads and writes each element once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_TILE, BACKWARD_TILE, WARPS = (32, 64), (16, 128), 4
"""Rows and columns of a tile, and warps: the fastest of a dozen on an H200. A tile in float32 must fit the registers."""


def forward(gate_MI: Tensor, up_MI: Tensor, low_MR: Tensor, gate_b_IG: Tensor, up_b_IU: Tensor) -> Tensor:
    out = torch.empty_like(gate_MI, memory_format=torch.contiguous_format)
    tensors, sizes, grid = _arguments(FORWARD_TILE, gate_MI, up_MI, low_MR, gate_b_IG, up_b_IU)
    kernel: Any = _forward
    kernel[grid](out, *tensors, **sizes)
    return out


def backward(
    grad_MI: Tensor, gate_MI: Tensor, up_MI: Tensor, low_MR: Tensor, gate_b_IG: Tensor, up_b_IU: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outs = [torch.empty_like(gate_MI, memory_format=torch.contiguous_format) for _ in range(3)]
    tensors, sizes, grid = _arguments(BACKWARD_TILE, gate_MI, up_MI, low_MR, gate_b_IG, up_b_IU)
    kernel: Any = _backward
    kernel[grid](*outs, grad_MI.contiguous(), *tensors, **sizes)
    return outs[0], outs[1], outs[2]


def _arguments(
    tile: tuple[int, int], gate_MI: Tensor, up_MI: Tensor, low_MR: Tensor, gate_b_IG: Tensor, up_b_IU: Tensor
) -> tuple[list[Tensor], dict[str, Any], tuple[int, int]]:
    rows, columns = gate_MI.shape
    ranks = gate_b_IG.shape[1], up_b_IU.shape[1]
    gate_low, up_low = low_MR.contiguous().split(ranks, dim=1)
    sizes = {
        "num_rows": rows,
        "num_columns": columns,
        "low_width": sum(ranks),
        "gate_rank": ranks[0],
        "up_rank": ranks[1],
        "PADDED": max(16, triton.next_power_of_2(max(ranks))),  # tensor cores sum over 16 at least
        "ROWS": tile[0],
        "COLUMNS": tile[1],
        "num_warps": WARPS,
    }
    tensors = [gate_MI.contiguous(), up_MI.contiguous(), gate_low, up_low, gate_b_IG.contiguous(), up_b_IU.contiguous()]
    return tensors, sizes, (triton.cdiv(columns, tile[1]), triton.cdiv(rows, tile[0]))


@triton.jit
def _forward(
    out, gate, up, gate_low, up_low, gate_b, up_b, num_rows, num_columns, low_width, gate_rank, up_rank,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, places, inside = _tile(num_rows, num_columns, ROWS, COLUMNS)
    x = _with_low(gate, gate_low, gate_b, row, column, places, inside, low_width, gate_rank, PADDED)
    y = _with_low(up, up_low, up_b, row, column, places, inside, low_width, up_rank, PADDED)
    tl.store(out + places, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate_grad, up_grad, out, grad, gate, up, gate_low, up_low, gate_b, up_b, num_rows, num_columns, low_width, gate_rank, up_rank,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, places, inside = _tile(num_rows, num_columns, ROWS, COLUMNS)
    x = _with_low(gate, gate_low, gate_b, row, column, places, inside, low_width, gate_rank, PADDED)
    y = _with_low(up, up_low, up_b, row, column, places, inside, low_width, up_rank, PADDED)
    towards = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    activated = x * share
    tl.store(gate_grad + places, (towards * y * share * (1 + x * (1 - share))).to(out.dtype.element_ty), mask=inside)
    tl.store(up_grad + places, (towards * activated).to(out.dtype.element_ty), mask=inside)
    tl.store(out + places, (activated * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's rows and columns (clamped at the edge), its elements' offsets, and the mask of those inside."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    places = row[:, None] * num_columns + column[None, :]
    return tl.minimum(row, num_rows - 1), tl.minimum(column, num_columns - 1), places, inside


@triton.jit
def _with_low(values, low, b, row, column, places, inside, low_width, rank, PADDED: tl.constexpr):
    """The tile of values + low @ b.T in float32."""
    r = tl.arange(0, PADDED)
    left = tl.load(low + row[:, None] * low_width + r[None, :], mask=r[None, :] < rank, other=0.0)
    right = tl.load(b + column[None, :] * rank + r[:, None], mask=r[:, None] < rank, other=0.0)
    return tl.dot(left, right) + tl.load(values + places, mask=inside, other=0.0).to(tl.float32)

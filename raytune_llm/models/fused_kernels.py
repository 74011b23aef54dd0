"""The Triton kernels of fused.py. Each reads and writes an element once, and computes in float32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, WARPS = 1024, 4
"""The columns of one program of `gated`, and the warps of all kernels but long norms."""


def norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last dimension, in x's type."""
    width = x.shape[-1]
    x_ND = x.reshape(-1, width)
    out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    kernel: Any = _norm
    padded = triton.next_power_of_2(width)
    kernel[(len(x_ND),)](out_ND, x_ND, weight_D, x_ND.stride(0), eps, WIDTH=width, PADDED=padded, num_warps=_warps(padded))
    return out_ND.view(x.shape)


def rotate_(x_HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotary positions over halves, in place: x * cos + (-second half, first half) * sin."""
    heads, length, head = x_HTD.shape
    half = head // 2
    kernel: Any = _rotate
    kernel[(length,)](
        x_HTD, cos_TD, sin_TD, x_HTD.stride(0), x_HTD.stride(1), cos_TD.stride(0), sin_TD.stride(0), HEADS=heads, HALF=half,
        PADDED_HEADS=triton.next_power_of_2(heads), PADDED_HALF=triton.next_power_of_2(half), num_warps=WARPS,
    )  # fmt: skip


def gated(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up. They may be columns of one tensor."""
    rows, width = gate_NI.shape
    out_NI = torch.empty_like(gate_NI, memory_format=torch.contiguous_format)
    kernel: Any = _gated
    grid = (rows, triton.cdiv(width, COLUMNS))
    kernel[grid](out_NI, gate_NI, up_NI, gate_NI.stride(0), up_NI.stride(0), WIDTH=width, COLUMNS=COLUMNS, num_warps=WARPS)
    return out_NI


def _warps(padded: int) -> int:
    return min(16, max(1, padded // 512))


@triton.jit
def _norm(out, x, weight, stride, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    values = tl.load(x + row * stride + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    factors = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + d, (values * scale * factors).to(out.dtype.element_ty), mask=d < WIDTH)


@triton.jit
def _rotate(
    x, cos, sin, head_stride, token_stride, cos_stride, sin_stride, HEADS: tl.constexpr, HALF: tl.constexpr,
    PADDED_HEADS: tl.constexpr, PADDED_HALF: tl.constexpr,
):  # fmt: skip
    token, h, d = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED_HEADS), tl.arange(0, PADDED_HALF)
    inside = (h[:, None] < HEADS) & (d[None, :] < HALF)
    first = x + token * token_stride + h[:, None] * head_stride + d[None, :]
    second = first + HALF
    one = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(second, mask=inside, other=0.0).to(tl.float32)
    there = d < HALF
    cos_one = tl.load(cos + token * cos_stride + d, mask=there, other=0.0).to(tl.float32)
    cos_two = tl.load(cos + token * cos_stride + HALF + d, mask=there, other=0.0).to(tl.float32)
    sin_one = tl.load(sin + token * sin_stride + d, mask=there, other=0.0).to(tl.float32)
    sin_two = tl.load(sin + token * sin_stride + HALF + d, mask=there, other=0.0).to(tl.float32)
    tl.store(first, (one * cos_one[None, :] - two * sin_one[None, :]).to(x.dtype.element_ty), mask=inside)
    tl.store(second, (two * cos_two[None, :] + one * sin_two[None, :]).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gated(out, gate, up, gate_stride, up_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    values = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    factors = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (values * tl.sigmoid(values) * factors).to(out.dtype.element_ty), mask=inside)

"""The kernels of `few_rows`: a product of a few rows takes only the time to read its weight once.

A program reads some rows of the weight. If that gives too few programs to keep a GPU busy, the columns are divided too, and a
second kernel adds the partial sums in order. Sums are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from raytune_llm.models.quantization.fp8 import E4M3, E4M3_MAX

OUTPUTS, WARPS, WIDE = 64, 4, 1024
"""Rows of the weight per program, warps per program, and outputs per program of the second kernel."""
PROGRAMS = 96
"""Columns are divided until there are this many programs. Fewer would leave multiprocessors idle; each further part costs a
sum."""
MOST_PARTS = 8


def product(x_MK: Tensor, weight_NK: Tensor, dtype: torch.dtype, scales: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x @ weight.T: [M, N] in `dtype`; x and weight are contiguous. scales: for x and weight in e4m3, the float32 scales of their
    rows [M] and [N]."""
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    rows, inputs = max(16, triton.next_power_of_2(M)), 256 if weight_NK.element_size() == 1 else 128
    blocks, parts = triton.cdiv(N, OUTPUTS), 1
    while blocks * parts < PROGRAMS and parts < MOST_PARTS:
        parts *= 2
    stages = 6 if blocks * parts < 3 * PROGRAMS and rows <= 64 else 4
    out_MN = torch.empty(M, N, dtype=dtype, device=x_MK.device)
    into = out_MN if parts == 1 else torch.empty(parts, M, N, dtype=torch.float32, device=x_MK.device)
    x_scale, scale = scales or (x_MK, x_MK)
    multiply: Any = _multiply
    multiply[(blocks, parts)](
        x_MK, weight_NK, x_scale, scale, into, M, N, K, parts, ROWS=rows, OUTPUTS=OUTPUTS, INPUTS=inputs, SPLIT=parts > 1,
        SCALED=scales is not None, WHOLE=K % (inputs * parts) == 0 and N % OUTPUTS == 0, EXACT=x_MK.dtype == torch.float32,
        num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        add: Any = _add
        add[(M, triton.cdiv(N, WIDE))](
            into, x_scale, scale, out_MN, M, N, PARTS=parts, SCALED=scales is not None, WIDE=WIDE, num_warps=WARPS
        )
    return out_MN


def rows_in_fp8(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """x's rows scaled to the range of e4m3, [M, K], and the scales to multiply them with again, float32 [M]. x is contiguous."""
    M, K = x_MK.shape
    rounded_MK = torch.empty_like(x_MK, dtype=E4M3)
    scale_M = torch.empty(M, dtype=torch.float32, device=x_MK.device)
    kernel: Any = _round
    warps = 8 if K <= 8192 else 16
    kernel[(M,)](x_MK, rounded_MK, scale_M, K, LARGEST=E4M3_MAX, SIZE=triton.next_power_of_2(K), num_warps=warps)
    return rounded_MK, scale_M


@triton.jit
def _multiply(
    x, weight, x_scale, scale, into, M, N, K, parts, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    SPLIT: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    m, n, k = tl.arange(0, ROWS), block * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    each = tl.cdiv(tl.cdiv(K, INPUTS), parts) * INPUTS
    start = part * each
    from_weight = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    from_x = x + m[None, :] * K + k[:, None]
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for at in range(start, tl.minimum(start + each, K), INPUTS):
        if WHOLE:
            tile = tl.load(from_weight + at, eviction_policy="evict_first")
            values = tl.load(from_x + at, mask=m[None, :] < M, other=0.0)
        else:
            inside = at + k < K
            tile = tl.load(from_weight + at, mask=(n[:, None] < N) & inside[None, :], other=0.0, eviction_policy="evict_first")
            values = tl.load(from_x + at, mask=(m[None, :] < M) & inside[:, None], other=0.0)
        total = tl.dot(tile, values, total, input_precision="ieee") if EXACT else tl.dot(tile, values, total)
    if SCALED and not SPLIT:
        total *= tl.load(x_scale + m, mask=m < M, other=0.0)[None, :] * tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    to = into + (part * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(to, total.to(into.dtype.element_ty), mask=(n[:, None] < N) & (m[None, :] < M))


@triton.jit
def _add(parts, x_scale, scale, out, M, N, PARTS: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.float32)
    for part in tl.static_range(PARTS):  # type: ignore[misc]
        total += tl.load(parts + (part * M + row).to(tl.int64) * N + n, mask=n < N, other=0.0)
    if SCALED:
        total *= tl.load(x_scale + row) * tl.load(scale + n, mask=n < N, other=0.0)
    tl.store(out + row.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _round(x, rounded, scale, K, LARGEST: tl.constexpr, SIZE: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    values = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    one = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) * (1 / LARGEST)  # torch divides by a number in this way
    tl.store(scale + row, one)
    tl.store(rounded + row * K + k, tl.div_rn(values, one).to(rounded.dtype.element_ty), mask=k < K)

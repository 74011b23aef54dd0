"""The kernel behind `few_rows_in_fp8`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


def rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over its largest magnitude in e4m3, and what to multiply it with again, [M, 1] float32."""
    M, K = x_MK.shape
    made = torch.empty_like(x_MK, dtype=torch.float8_e4m3fn)
    scale_M1 = x_MK.new_empty((M, 1), dtype=torch.float32)
    kernel: Any = _rows
    kernel[(M,)](x_MK, made, scale_M1, K, 448.0, WIDTH=triton.next_power_of_2(K), num_warps=WARPS)
    return made, scale_M1


@triton.jit
def _rows(x, made, scales, K, largest, WIDTH: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    values = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / largest
    tl.store(scales + row, scale)
    tl.store(made + row * K + k, (values / scale).to(made.dtype.element_ty), mask=k < K)

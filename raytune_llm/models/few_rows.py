"""Linear layers for decoding on a GPU: layers with the same input become one product, and few rows have special kernels.

With few rows, the time of a product is the time to read its weight. Kernels of libraries are made for many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_llm.models.packed import Packing
from raytune_llm.models.quantization.fp8 import FP8Linear, fp8_product

FEW, FEW_FP8 = 32, 128
"""Up to this many rows, these kernels were faster on an H200 than cuBLAS (bf16) and torch._scaled_mm (FP8)."""


class FewRowsLinear(nn.Module):
    """x W^T + b, forward only. weight [O, K] in the run's precision."""

    def __init__(self, weight_OK: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OK, persistent=False)
        self.weight: Tensor
        self.bias = bias_O

    def forward(self, x: Tensor) -> Tensor:
        x_MK = x.flatten(0, -2).to(self.weight.dtype)
        # Compiled code always uses the operator, so that it need not be compiled again for many rows.
        few = torch.compiler.is_compiling() or len(x_MK) <= FEW
        y_MO = few_rows(x_MK, self.weight) if few else F.linear(x_MK, self.weight)
        y = y_MO.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FewRowsFP8Linear(nn.Module):
    """The product of FP8Linear, forward only: weight [O, K] in e4m3 with one scale per row, and x rounded in the same way."""

    def __init__(self, weight_OK: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        for name, tensor in (("weight", weight_OK), ("scale", scale_O)):
            self.register_buffer(name, tensor, persistent=False)
        self.weight: Tensor
        self.scale: Tensor
        self.bias = bias_O

    def forward(self, x: Tensor) -> Tensor:
        y = few_rows_fp8(x.flatten(0, -2).to(torch.bfloat16), self.weight, self.scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FewRows(Packing):
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, FP8Linear)

    @staticmethod
    def lacks(device: torch.device, dtype: torch.dtype) -> str | None:
        """In float32, layers are not packed, so that a served model computes exactly what the trained model computed."""
        if device.type != "cuda":
            return "it is for GPUs"
        return None if dtype == torch.bfloat16 else "it is for bf16"

    @staticmethod
    def packed(linears: Sequence[Any], bias_O: Tensor | None) -> nn.Module:
        if isinstance(linears[0], FP8Linear):
            weights, scales = zip(*((one.forward_weight, one.forward_scale.flatten()) for one in linears), strict=True)
            whole = torch.cat([weight.view(torch.uint8) for weight in weights]).view(weights[0].dtype)
            return FewRowsFP8Linear(whole, torch.cat(scales), bias_O)
        weights = [one.weight.detach().to(torch.bfloat16) for one in linears]
        return FewRowsLinear(weights[0] if len(weights) == 1 else torch.cat(weights), bias_O)


@torch.library.custom_op("raytune_llm::few_rows", mutates_args=())
def few_rows(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ weight.T: [M, N]."""
    if not x_MK.is_cuda or len(x_MK) > FEW:
        return F.linear(x_MK, weight_NK)
    from raytune_llm.models.few_rows_kernels import product

    return product(x_MK.contiguous(), weight_NK, x_MK.dtype)


@torch.library.custom_op("raytune_llm::few_rows_fp8", mutates_args=())
def few_rows_fp8(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """x @ weight.T: [M, N] in x's type. weight_NK: e4m3; scale_N: float32 scales of its rows."""
    if not x_MK.is_cuda:
        return fp8_product(x_MK, weight_NK, scale_N[None])
    from raytune_llm.models.few_rows_kernels import product, rows_in_fp8

    rounded_MK, scale_M = rows_in_fp8(x_MK.contiguous())
    if len(x_MK) <= FEW_FP8:
        return product(rounded_MK, weight_NK, x_MK.dtype, (scale_M, scale_N))
    return torch._scaled_mm(
        rounded_MK, weight_NK.T, scale_a=scale_M[:, None], scale_b=scale_N[None], out_dtype=x_MK.dtype, use_fast_accum=True
    )


@few_rows.register_fake
def _(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])


@few_rows_fp8.register_fake
def _(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])

"""Products in FP8 (e4m3) with rowwise scales for both operands (Micikevicius et al. 2022, arXiv 2209.05433)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raytune_llm.models.quantization.base import Quantization, QuantizedLinear
from raytune_llm.models.quantization.experts import BITS_PER_WEIGHT, hold_rows

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
MIN_CAPABILITY = (9, 0)
"""Tensor cores support rowwise scales since Hopper, for layers whose sizes are multiples of SIZE_MULTIPLE."""
SIZE_MULTIPLE = 16


class FP8Linear(QuantizedLinear):
    """A frozen linear layer with products in FP8. The forward product sums over inputs and the backward product over outputs, and
    tensor cores need the summed dimension last. So the weight is stored twice, each with its own scales, in the memory of bf16.
    """

    HELD = ("forward_weight", "forward_scale", "backward_weight", "backward_scale")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_NK = linear.weight.detach()
        for name, matrix in (("forward", weight_NK), ("backward", weight_NK.T.contiguous())):
            quantized, scale = _rows_in_fp8(matrix)
            self.register_buffer(f"{name}_weight", quantized, persistent=False)
            self.register_buffer(f"{name}_scale", scale.T.contiguous(), persistent=False)

    def unpacked_product(self, x_MK: Tensor) -> Tensor:
        weight_NK, scale_1N, *_ = self.weights()
        return (x_MK @ weight_NK.to(x_MK.dtype).T) * scale_1N.to(x_MK.dtype)

    @staticmethod
    def product(x_MK: Tensor, weight_NK: Tensor, scale_1N: Tensor, transposed_KN: Tensor, transposed_scale_1K: Tensor) -> Tensor:
        return fp8_product(x_MK, weight_NK, scale_1N)

    @staticmethod
    def transposed(
        grad_MN: Tensor, weight_NK: Tensor, scale_1N: Tensor, transposed_KN: Tensor, transposed_scale_1K: Tensor
    ) -> Tensor:
        return fp8_product(grad_MN, transposed_KN, transposed_scale_1K)


class TrainedFP8Linear(nn.Linear):
    """A trained linear layer with products in FP8. Its weight and its gradient keep the run's precision.

    The two products of a step that contain the weight are in FP8. The weight's gradient, a sum over thousands of tokens that the
    optimizer uses, is computed in the run's precision.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        y = _TrainedProduct.apply(input.flatten(0, -2).to(dtype), self.weight.to(dtype)).view(*input.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(dtype)


class _TrainedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        rows, scale_N1 = _rows_in_fp8(weight_NK)
        return fp8_product(x_MK, rows, scale_N1.T)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> Any:  # type: ignore[override]
        x_MK, weight_NK = ctx.saved_tensors
        rows, scale_K1 = _rows_in_fp8(weight_NK.T.contiguous())
        return fp8_product(grad_MN.contiguous(), rows, scale_K1.T), grad_MN.T @ x_MK


def fp8_product(x_MK: Tensor, weight_NK: Tensor, scale_1N: Tensor) -> Tensor:
    """x @ weight.T, [M, N] in x's dtype. x is quantized to e4m3 with a scale per row; the weight is in e4m3, with scales [1,
    N]."""
    rows, scale_M1 = _rows_in_fp8(x_MK)
    return torch._scaled_mm(rows, weight_NK.T, scale_a=scale_M1, scale_b=scale_1N, out_dtype=x_MK.dtype, use_fast_accum=True)


def _rows_in_fp8(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row [.., M, K] in e4m3, divided by its scale, and the scales [.., M, 1] in float32."""
    scale_M1 = x_MK.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (x_MK.float() / scale_M1).to(E4M3), scale_M1


def hold_experts(experts: nn.Module, name: str) -> None:
    hold_rows(experts, name, *_rows_in_fp8(experts.get_parameter(name).detach()))


class FP8(Quantization):
    layer = FP8Linear
    trained_layer = TrainedFP8Linear
    bits_per_weight = 16.0
    replaces_experts = staticmethod(hold_experts)
    bits_per_expert_weight = BITS_PER_WEIGHT

    @staticmethod
    def lacks(device_type: str, capability: tuple[int, int]) -> str | None:
        if device_type != "cuda":
            return "it needs a GPU"
        least, found = (".".join(map(str, version)) for version in (MIN_CAPABILITY, capability))
        return None if capability >= MIN_CAPABILITY else f"it needs a GPU of compute capability {least}, this one has {found}"

    def misfit(self, linear: nn.Linear) -> str | None:
        sizes = linear.out_features, linear.in_features
        if not any(size % SIZE_MULTIPLE for size in sizes):
            return None
        return f"{sizes[0]} x {sizes[1]} are not multiples of {SIZE_MULTIPLE}"

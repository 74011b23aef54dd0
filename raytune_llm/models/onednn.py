"""Linear layers whose frozen weights are in oneDNN's own layout, for serving on a CPU in bf16.

torch's own product would reorder the weights, or use a slower kernel, at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raytune_llm.models.packed import Packing

TOKENS = 32
"""The number of tokens that the layout is optimized for; other numbers are nearly as fast."""


def reordered(weight_OK: Tensor) -> Tensor:
    """The weight in oneDNN's own layout, which only products can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OK.contiguous(), TOKENS)


def product(x_TK: Tensor, weight_OK: Tensor, operation: Literal["add", "mul"], other_TO: Tensor) -> Tensor:
    """x W^T + other, or x W^T * other, rounded once. weight_OK: reordered."""
    return torch.ops.mkldnn._linear_pointwise.binary(x_TK, other_TO, weight_OK, None, operation)


class OneDNNLinear(nn.Module):
    """x W^T + b, forward only."""

    def __init__(self, weight_OK: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight = reordered(weight_OK)
        self.bias = bias_O

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class OneDNN(Packing):
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    joins_adapters = True

    @staticmethod
    def lacks(device: torch.device, dtype: torch.dtype) -> str | None:
        """In float32 layers stay as they are, so that a served model computes exactly what the trained one did."""
        if device.type != "cpu":
            return "it is for CPUs"
        if dtype != torch.bfloat16:
            return "it is for bf16"
        if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bf16 products here"
        return None

    @staticmethod
    def packed(linears: Sequence[Any], bias_O: Tensor | None) -> nn.Module:
        weights = [linear.weight.detach() for linear in linears]
        return OneDNNLinear(weights[0] if len(weights) == 1 else torch.cat(weights), bias_O)

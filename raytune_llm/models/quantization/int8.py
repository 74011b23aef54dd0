"""Weights in eight bits with one scale per row, as in LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339).

Products are computed in the activations' dtype. Only weights are rounded, so activations need no separate path for outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytune_llm.models.quantization.base import Quantization, UnpackedLinear
from raytune_llm.models.quantization.experts import hold_rows

INT8_MAX = 127.0


class Int8Linear(UnpackedLinear):
    HELD = ("rounded", "scales")

    def __init__(self, linear: nn.Linear) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        super().__init__(linear)
        rounded_NK, largest_N, _ = int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
        self.register_buffer("rounded", rounded_NK, persistent=False)
        self.register_buffer("scales", largest_N.float() / INT8_MAX, persistent=False)

    @staticmethod
    def times(x: Tensor, *held: Tensor, transposed: bool) -> Tensor:
        return _int8_product(x, *held, transposed=transposed)


@torch.library.custom_op("raytune_llm::int8_product", mutates_args=())
def _int8_product(x: Tensor, rounded_NK: Tensor, scales_N: Tensor, transposed: bool) -> Tensor:
    # Eight-bit integers are exact in every dtype that x may have.
    wide_NK, scales_N = rounded_NK.to(x.dtype), scales_N.to(x.dtype)
    return (x * scales_N) @ wide_NK if transposed else (x @ wide_NK.T) * scales_N


@_int8_product.register_fake
def _(x: Tensor, rounded_NK: Tensor, scales_N: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], rounded_NK.shape[1 if transposed else 0]))


def hold_experts(experts: nn.Module, name: str) -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    weight_ENK = experts.get_parameter(name).detach()
    rounded, largest, _ = int8_vectorwise_quant(weight_ENK.flatten(0, 1).to(torch.float16))
    hold_rows(experts, name, rounded.view(weight_ENK.shape), (largest / INT8_MAX).view(*weight_ENK.shape[:2], 1))


class Int8(Quantization):
    layer = Int8Linear
    bits_per_weight = 8.0
    replaces_experts = staticmethod(hold_experts)
    package = "bitsandbytes"

    @staticmethod
    def lacks(device_type: str, capability: tuple[int, int]) -> str | None:
        return None

    def misfit(self, linear: nn.Linear) -> str | None:
        return None

"""QLoRA's base: weights in four bits, blocks of 64 with one eight-bit scale each (Dettmers et al. 2023, arXiv 2305.14314).

bitsandbytes quantizes and dequantizes, on GPUs and on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raytune_llm.models.quantization.base import Quantization, UnpackedLinear

BLOCK, SCALES_BLOCK = 64, 256
"""Weights per scale, and scales per scale of scales."""


class NF4Linear(UnpackedLinear):
    CODE: ClassVar[str] = "nf4"
    """bitsandbytes' name of the sixteen values that a weight can have."""
    HELD = ("packed", "scales", "scales_of_scales", "code_of_scales", "mean_scale")

    def __init__(self, linear: nn.Linear) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__(linear)
        packed, state = quantize_4bit(linear.weight.detach(), quant_type=self.CODE, blocksize=BLOCK, compress_statistics=True)
        assert state.state2 is not None and state.offset is not None
        held = (packed, state.absmax, state.state2.absmax, state.state2.code, state.offset)
        for name, tensor in zip(self.HELD, held, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def times(cls, x: Tensor, *held: Tensor, transposed: bool) -> Tensor:
        return _four_bit_product(x, *held, transposed=transposed, code=cls.CODE)


@torch.library.custom_op("raytune_llm::four_bit_product", mutates_args=())
def _four_bit_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    scales_of_scales: Tensor,
    code_of_scales: Tensor,
    mean_scale: Tensor,
    transposed: bool,
    code: str,
) -> Tensor:
    bnb = torch.ops.bitsandbytes
    wide = bnb.dequantize_blockwise(scales, scales_of_scales, code_of_scales, SCALES_BLOCK, torch.float32) + mean_scale
    shape = [x.shape[1], _other_size(x, packed)] if transposed else [_other_size(x, packed), x.shape[1]]
    weight = bnb.dequantize_4bit(packed, wide, BLOCK, code, unpacked_as(shape), x.dtype).view(shape)
    return x @ weight if transposed else x @ weight.T


@_four_bit_product.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    scales_of_scales: Tensor,
    code_of_scales: Tensor,
    mean_scale: Tensor,
    transposed: bool,
    code: str,
) -> Tensor:
    return x.new_empty((x.shape[0], _other_size(x, packed)))


def _other_size(x: Tensor, packed: Tensor) -> int:
    """The other dimension of a packed weight of which one dimension is x's number of columns. A byte holds two weights."""
    return 2 * packed.shape[0] // x.shape[1]


def unpacked_as(shape: Sequence[int], block: int = BLOCK) -> list[int]:
    """A shape with the same number of weights and rows of whole blocks: on a CPU, bitsandbytes (0.50) starts a new block in each
    row."""
    size = math.prod(shape)
    if shape[-1] % block == 0:
        return list(shape)
    return [size // block, block] if size % block == 0 else [1, size]


class Reshaped(nn.Module):
    """A parametrization, applied after dequantizing, that restores the parameter's shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.view(self.shape)


def packed_shapes(model: nn.Module) -> dict[nn.Parameter, torch.Size]:
    """The parameter of packed experts -> the shape [E, N, K] that they are unpacked to."""
    lists = (module for module in model.modules() if isinstance(module, parametrize.ParametrizationList))
    return {one.get_parameter("original"): last.shape for one in lists if isinstance(last := one[-1], Reshaped)}


def pack_experts(experts: nn.Module, name: str, code: str) -> None:
    """Quantize the experts of a mixture. The layer dequantizes all of them together, once per pass."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    weight = experts.get_parameter(name)
    weight.data, shape = weight.data.reshape(unpacked_as(weight.shape)), weight.shape
    replace_parameter_4bit(experts, name, compress_statistics=True, quant_type=code, blocksize=BLOCK)  # type: ignore[arg-type]
    parametrize.register_parametrization(experts, name, Reshaped(shape), unsafe=True)


class NF4(Quantization):
    layer = NF4Linear
    replaces_experts = staticmethod(partial(pack_experts, code=NF4Linear.CODE))
    bits_per_weight = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES_BLOCK)
    package = "bitsandbytes"

    @staticmethod
    def lacks(device_type: str, capability: tuple[int, int]) -> str | None:
        return None

    def misfit(self, linear: nn.Linear) -> str | None:
        if linear.weight.numel() % 2 == 0:
            return None
        return f"{linear.out_features} x {linear.in_features} weights are an odd number, and a byte holds two"

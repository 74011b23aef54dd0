"""Half-quadratic quantization (Badri and Shaji 2023): weights in four bits, groups of 64 with a scale and a zero point each.

A solver fits scale and zero point to the weights without data, whereas bitsandbytes rounds to fixed values. The package hqq
quantizes and dequantizes, on GPUs and on CPUs. A group is within one row, as in transformers' HqqConfig.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytune_llm.models.quantization.base import Quantization, UnpackedLinear

BITS, GROUP = 4, 64


class HQQLinear(UnpackedLinear):
    HELD = ("packed", "scales", "zeros")

    def __init__(self, linear: nn.Linear) -> None:
        from hqq.core.quantize import Quantizer

        super().__init__(linear)
        weight = linear.weight.detach()
        packed, made = Quantizer.quantize(weight, nbits=BITS, group_size=GROUP, axis=1, device=str(weight.device))
        for name, tensor in zip(self.HELD, (packed, made["scale"].half(), made["zero"].half()), strict=True):
            self.register_buffer(name, tensor.clone(), persistent=False)  # its solver's are tensors of inference mode

    @staticmethod
    def times(x: Tensor, *held: Tensor, transposed: bool) -> Tensor:
        return _hqq_product(x, *held, transposed=transposed)


@torch.library.custom_op("raytune_llm::hqq_product", mutates_args=())
def _hqq_product(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, transposed: bool) -> Tensor:
    from hqq.core.bitpack import BitPack

    # in bf16 a zero of 15 would be off by a sixteenth of a step
    wide = torch.float32 if x.dtype == torch.float32 else torch.float16
    groups = (BitPack.unpack_4bit_u8(packed, dtype=wide) - zeros) * scales
    weight = groups.to(x.dtype).view((x.shape[1], -1) if transposed else (-1, x.shape[1]))
    return x @ weight if transposed else x @ weight.T


@_hqq_product.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], 2 * packed.numel() // x.shape[1]))


class HQQ(Quantization):
    layer = HQQLinear
    bits_per_weight = BITS + 2 * 16 / GROUP
    package = extra = "hqq"

    @staticmethod
    def lacks(device_type: str, capability: tuple[int, int]) -> str | None:
        return None

    def misfit(self, linear: nn.Linear) -> str | None:
        if linear.weight.numel() % (2 * GROUP) == 0:
            return None
        return f"{linear.out_features} x {linear.in_features} weights are not an even number of groups of {GROUP}"

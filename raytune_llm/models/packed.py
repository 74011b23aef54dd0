"""Linear layers whose frozen weights lie as oneDNN reads them: for serving on a CPU in bf16.

A product of torch's own reorders its weights, or takes a slower kernel, at every call. Layers that share an input become one
product as well: at a few tokens a product's start costs as much as its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytune_llm.models.quantization.linears import linears_but

TOKENS = 32
"""The number of tokens whose best order the weights get; other numbers are nearly as fast in it."""


class PackedLinear(nn.Module):
    """x W^T + b, forward only."""

    def __init__(self, weight_OK: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OK, TOKENS)
        self.bias = bias_O

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedPart(nn.Module):
    """A layer that is a part of the product of several."""

    def __init__(self, whole: PackedLinear, sizes: Sequence[int], number: int) -> None:
        super().__init__()
        self.whole, self.sizes, self.number = whole, list(sizes), number

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x).split(self.sizes, dim=-1)[self.number]


def products(x: Tensor, linears: Sequence[nn.Module]) -> list[Tensor]:
    """The output of each layer for one input."""
    first = linears[0]
    if isinstance(first, PackedPart) and len(linears) == len(first.sizes):
        return list(first.whole(x).split(first.sizes, dim=-1))
    return [linear(x) for linear in linears]


def lacks_for_packing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why layers can't be packed; None if they can. In float32 they stay as they are, so that a served model computes exactly
    what the trained one did."""
    if device.type != "cpu":
        return "it is for CPUs"
    if dtype != torch.bfloat16:
        return "it is for bf16"
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bf16 products here"
    return None


@torch.no_grad()
def pack(layers: Sequence[nn.Module]) -> None:
    """Replace the linear layers in a model's layers, those inside a bank of adapters too. Their weights can't be read any more.

    Modules that name children in `SHARE_AN_INPUT` ask `products` for those.
    """
    found = {id(linear): (parent, name) for parent, name, linear in linears_but(layers, [])}
    for holder in (module for layer in layers for module in list(layer.modules())):
        names: tuple[str, ...] = getattr(holder, "SHARE_AN_INPUT", ())
        children = [getattr(holder, name) for name in names]
        linears = [getattr(child, "base_layer", child) for child in children]
        if linears and all(id(linear) in found for linear in linears):
            biases = [linear.bias for linear in linears]
            if any(bias is None for bias in biases) == all(bias is None for bias in biases):
                bias = None if biases[0] is None else torch.cat(biases)
                whole = PackedLinear(torch.cat([linear.weight for linear in linears]), bias)
                for number, linear in enumerate(linears):
                    parent, name = found.pop(id(linear))
                    setattr(parent, name, PackedPart(whole, [other.out_features for other in linears], number))
    for parent, name in found.values():
        linear = getattr(parent, name)
        setattr(parent, name, PackedLinear(linear.weight.detach(), linear.bias))

"""Packs frozen linear layers for serving: weights get a device-specific layout, and layers with the same input become one
product.

With few tokens, starting a product costs as much as its arithmetic. There are two packings: oneDNN's for CPUs (onednn.py), and
one with our own kernels for GPUs (few_rows.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raytune_llm.models.quantization.linears import linears_of


class Packing(ABC):
    kinds: ClassVar[tuple[type[nn.Module], ...]]
    """The types of layers that can be packed."""
    joins_adapters: ClassVar[bool] = False
    """Adapters of layers that became one product should be joined too, since that is faster."""

    @staticmethod
    @abstractmethod
    def lacks(device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why layers can't be packed on this device; None if they can."""

    @staticmethod
    @abstractmethod
    def packed(linears: Sequence[Any], bias_O: Tensor | None) -> nn.Module:
        """One product for these layers, which are of one type. bias_O: their biases, concatenated."""


class PackedPart(nn.Module):
    """One of several layers that share a product."""

    def __init__(self, whole: nn.Module, sizes: Sequence[int], number: int) -> None:
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


@torch.no_grad()
def pack(layers: Sequence[nn.Module], packing: type[Packing]) -> None:
    """Replace the linear layers in a model's layers, including those inside a bank of adapters. Their weights can't be read
    afterwards.

    The children that a module names in `SHARE_AN_INPUT` become one product; the module calls `products` for them.
    """
    found = {id(linear): (parent, name) for parent, name, linear in linears_of(layers, packing.kinds)}
    for holder in (module for layer in layers for module in list(layer.modules())):
        names: tuple[str, ...] = getattr(holder, "SHARE_AN_INPUT", ())
        children = [getattr(holder, name) for name in names]
        linears = [getattr(child, "base_layer", child) for child in children]
        if linears and all(id(linear) in found for linear in linears) and len({type(linear) for linear in linears}) == 1:
            biases = [linear.bias for linear in linears]
            if any(bias is None for bias in biases) == all(bias is None for bias in biases):
                whole = packing.packed(linears, None if biases[0] is None else torch.cat(biases))
                for number, linear in enumerate(linears):
                    parent, name = found.pop(id(linear))
                    setattr(parent, name, PackedPart(whole, [other.out_features for other in linears], number))
    for parent, name in found.values():
        linear = getattr(parent, name)
        setattr(parent, name, packing.packed([linear], linear.bias))

"""A linear layer with a bank: each adapter adds to the output of its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raytune_llm.models.adapters.routes import Route
from raytune_llm.models.packed import products


class BankShape(NamedTuple):
    num_slots: int
    rank: int
    """That all slots have room for."""
    dtype: torch.dtype
    trains: bool


class Now:
    """What the layers of one model read: the route of the current forward pass."""

    route: Route | None = None


class BankedLinear(nn.Module):
    def __init__(self, base_layer: nn.Module, inputs: int, outputs: int, shape: BankShape, now: Now) -> None:
        """The last slot stays zero; tokens without an adapter use it."""
        super().__init__()
        self.base_layer, self.now = base_layer, now
        device = next(iter((*base_layer.parameters(), *base_layer.buffers()))).device
        for name, size in (("a_GRK", inputs), ("b_GRO", outputs)):
            zeros = torch.zeros(shape.num_slots + 1, shape.rank, size, dtype=shape.dtype, device=device)
            if shape.trains:
                self.register_parameter(name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros, persistent=False)
        self.a_GRK: Tensor
        self.b_GRO: Tensor
        scales = torch.ones(shape.num_slots + 1, 1, 1, dtype=shape.dtype, device=device) if shape.trains else None
        self.register_buffer("scale_G11", scales, persistent=False)
        self.scale_G11: Tensor | None
        """None where it is in b already."""

    def forward(self, x: Tensor) -> Tensor:
        return banked(x, [self])[0]

    def resize(self, num_slots: int, taken: Sequence[int]) -> None:
        """Keep these slots, as the first ones."""
        for name in ("a_GRK", "b_GRO", "scale_G11"):
            old: Tensor | None = getattr(self, name)
            if old is None:
                continue
            new = old.new_zeros(num_slots + 1, *old.shape[1:])
            new[: len(taken)] = old[list(taken)]
            setattr(self, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """a and b as the products take them."""
        b_GRO = self.b_GRO if self.scale_G11 is None else self.b_GRO * self.scale_G11
        return self.a_GRK.to(dtype), b_GRO.to(dtype)


def banked(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """The output of each banked layer for one input: that of the layer itself, and what the adapters of the pass add."""
    outs = products(x, [layer.base_layer for layer in layers])
    route = layers[0].now.route
    if route is None:
        return outs
    dtype = outs[0].dtype
    with torch.autocast(x.device.type, enabled=False):
        values = [layer.values(dtype) for layer in layers]
        added = route.add(
            [out.flatten(0, -2) for out in outs],
            x.flatten(0, -2).to(dtype),
            [a_GRK for a_GRK, _ in values],
            [b_GRO for _, b_GRO in values],
        )
    return [more.view(out.shape) for more, out in zip(added, outs, strict=True)]

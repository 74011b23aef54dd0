"""A linear layer with a bank of adapters. Each adapter changes the output of its own tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raytune_llm.models.adapters.routes import Route
from raytune_llm.models.onednn import OneDNNLinear
from raytune_llm.models.packed import PackedPart, products


class BankShape(NamedTuple):
    num_slots: int
    rank: int
    """The rank of each slot."""
    dtype: torch.dtype
    trains: bool


class Now:
    """The route of the current forward pass, shared by all layers of one model."""

    route: Route | None = None


@dataclass(frozen=True, eq=False)
class Joined:
    """Layers that share an input, computed together: one product for their bases, and one each for their A and their B."""

    base: nn.Module
    sizes: list[int]
    """Outputs of each layer."""
    a_GRK: Tensor
    """A of all layers, concatenated along the rank for each slot."""
    b_GRO: Tensor
    """B of all layers, block-diagonal for each slot."""


class BankedLinear(nn.Module):
    def __init__(self, base_layer: nn.Module, inputs: int, outputs: int, shape: BankShape, now: Now) -> None:
        """One more slot, the last, stays zero; tokens without an adapter use it."""
        super().__init__()
        self.base_layer, self.now = base_layer, now
        self.joined: Joined | None = None
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
        """The scale of each slot; None if it is folded into b."""

    def forward(self, x: Tensor) -> Tensor:
        return banked(x, [self])[0]

    def resize(self, num_slots: int, taken: Sequence[int]) -> None:
        """Change the number of slots; the `taken` ones become the first."""
        for name in ("a_GRK", "b_GRO", "scale_G11"):
            old: Tensor | None = getattr(self, name)
            if old is None:
                continue
            new = old.new_zeros(num_slots + 1, *old.shape[1:])
            new[: len(taken)] = old[list(taken)]
            setattr(self, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """a and b in the dtype of the products, with the scale in b."""
        b_GRO = self.b_GRO if self.scale_G11 is None else self.b_GRO * self.scale_G11
        return self.a_GRK.to(dtype), b_GRO.to(dtype)


def banked(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """The outputs of banked layers that share an input: each base layer's output plus the adapters' of this pass."""
    route = layers[0].now.route
    joined: Joined | None = layers[0].joined
    if joined is not None and len(layers) == len(joined.sizes):
        out = joined.base(x)
        if route is not None:
            (added,) = route.add([out.flatten(0, -2)], x.flatten(0, -2), [joined.a_GRK], [joined.b_GRO], joined)
            out = added.view(out.shape)
        return list(out.split(joined.sizes, dim=-1))
    outs = products(x, [layer.base_layer for layer in layers])
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


@torch.no_grad()
def join(layers: Sequence[BankedLinear]) -> list[Joined]:
    """Make the banks of layers whose bases are one product of oneDNN into views of one bank."""
    parts: dict[nn.Module, list[BankedLinear]] = {}
    made: list[Joined] = []
    for layer in layers:
        whole = layer.base_layer.whole if isinstance(layer.base_layer, PackedPart) else layer.base_layer
        if isinstance(whole, OneDNNLinear):
            parts.setdefault(whole, []).append(layer)
    for whole, own in parts.items():
        (slots, rank, inputs), sizes = own[0].a_GRK.shape, [layer.b_GRO.shape[2] for layer in own]
        a_GRK = own[0].a_GRK.new_empty(slots, len(own) * rank, inputs)
        b_GRO = a_GRK.new_zeros(slots, len(own) * rank, sum(sizes))
        blocks = b_GRO.unflatten(1, (len(own), rank)).unbind(1)
        for number, (layer, block_GRO) in enumerate(zip(own, blocks, strict=True)):
            for name, place in (
                ("a_GRK", a_GRK[:, number * rank : (number + 1) * rank]),
                ("b_GRO", block_GRO.split(sizes, dim=2)[number]),
            ):
                place.copy_(getattr(layer, name))
                setattr(layer, name, place)
        made.append(Joined(whole, sizes, a_GRK, b_GRO))
        for layer in own:
            layer.joined = made[-1]
    return made

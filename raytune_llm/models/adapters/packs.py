"""The adapters of decoding rows on a CPU in bf16: two products per layer, with weights in oneDNN's layout.

With few rows, a product takes the time of its launch and of reading its weights. So the A of several slots are packed into one
weight and their B into another, as in the masked route, but with the adapters' own ranks instead of the slots'. The products
themselves apply the mask and add the layer's output. A step computes the packs that its rows use. A pack is made when a step
first needs it, and again after one of its adapters has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from raytune_llm.models.adapters.bank_weights import Weights
from raytune_llm.models.adapters.banked import Joined
from raytune_llm.models.adapters.routes import Masked
from raytune_llm.models.onednn import product, reordered

COLUMNS = 64
"""The maximum sum of a pack's ranks. Larger packs need fewer launches, but are read whole even if few of their slots are used."""
Held = Sequence[tuple[int, Weights]]
"""Slots and their adapters, in ascending order."""


class Products(NamedTuple):
    a_CK: Tensor
    """Layer by layer, and slot by slot in each, in oneDNN's layout."""
    b_OC: Tensor


class Pack(NamedTuple):
    slot_C: Tensor
    """int64: the slot of each column."""
    products: Mapping[object, Products]
    """Joined layers -> their products."""


class Packs:
    """The packs of a bank's slots."""

    def __init__(self, wholes: Sequence[Joined]) -> None:
        self._wholes = wholes
        self._made: dict[tuple[tuple[int, Weights], ...], Pack] = {}

    @torch.no_grad()
    def route(self, slot_T: Tensor, held: Mapping[int, Weights], num_slots: int) -> Packed:
        """The route of decoding rows. slot_T: the slot of each row, -1 for none. held: slot -> adapter; other slots are empty."""
        wanted = set(slot_T.tolist())
        parts = [tuple(part) for part in _in_parts(sorted(held.items(), key=lambda item: item[0]))]
        self._made = {part: self._made[part] for part in parts if part in self._made}
        used = [part for part in parts if not wanted.isdisjoint(slot for slot, _ in part)]
        for part in used:
            if part not in self._made:
                self._made[part] = self._pack(part)
        packs = [self._made[part] for part in used]
        counts = {len(whole.sizes) for whole in self._wholes}
        masks = [(slot_T[:, None] == pack.slot_C).to(torch.bfloat16) for pack in packs]
        return Packed(packs, [{count: mask_TC.repeat(1, count) for count in counts} for mask_TC in masks], slot_T, num_slots)

    def _pack(self, part: Held) -> Pack:
        slot_C = torch.tensor([slot for slot, weights in part for _ in range(weights.rank)])
        rank_C = torch.tensor([rank for _, weights in part for rank in range(weights.rank)])
        return Pack(slot_C, {whole: _products(whole, slot_C, rank_C) for whole in self._wholes})


@dataclass(frozen=True, eq=False)
class Packed:
    """The route of decoding rows."""

    packs: Sequence[Pack]
    masks: Sequence[Mapping[int, Tensor]]
    """For each pack, number of joined layers -> [T, C]: 1 where the column belongs to the token's slot, else 0."""
    slot_T: Tensor
    num_slots: int

    @cached_property
    def plain(self) -> Masked:
        """The route for layers that are not joined."""
        return Masked.of(self.slot_T, self.num_slots, torch.bfloat16)

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        if whole is None:
            return self.plain.add(outs, x_TK, a, b)
        (out_TO,) = outs
        for pack, masks in zip(self.packs, self.masks, strict=True):
            a_CK, b_OC = pack.products[whole]
            low_TC = product(x_TK, a_CK, "mul", masks[a_CK.shape[0] // len(pack.slot_C)])
            out_TO = product(low_TC, b_OC, "add", out_TO)
        return [out_TO]


def _in_parts(held: Held) -> Iterator[Held]:
    """Runs of slots whose ranks sum to at most COLUMNS, or of one slot."""
    start = ranks = 0
    for at, (_, weights) in enumerate(held):
        if at > start and ranks + weights.rank > COLUMNS:
            yield held[start:at]
            start, ranks = at, 0
        ranks += weights.rank
    if held:
        yield held[start:]


def _products(whole: Joined, slot_C: Tensor, rank_C: Tensor) -> Products:
    layers = len(whole.sizes)
    room = whole.a_GRK.shape[1] // layers
    row_LC = (slot_C * layers + torch.arange(layers)[:, None]) * room + rank_C
    a_CK, b_CO = (bank.flatten(0, 1)[row_LC.flatten()] for bank in (whole.a_GRK, whole.b_GRO))
    return Products(reordered(a_CK), reordered(b_CO.T))

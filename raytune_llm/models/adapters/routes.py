"""Routes: which adapter each token of a forward pass uses, and the low-rank products for it.

A bank has a [G, R, K] and b [G, R, O] for every layer, with one slot per adapter and ranks padded with zeros. Each route adds
(x @ a[slot].T) @ b[slot] to y = x @ weight.T for each token. A token without an adapter (slot -1) keeps y bit for bit.

Ranges: the tokens of a document are contiguous, and the host knows the bounds. There is one product per range, without wasted
arithmetic. For CPUs, where launching a product is cheap.

Sorted: tokens are sorted by slot, and one grouped product computes all of them. No value is needed on the host, and shapes depend
only on the number of tokens. An adapter's gradients use only its own tokens, so that infinite values of others don't reach it.
For training on GPUs, and for prompts with adapters of high rank, where Ranges would be bound by launches, and its bounds would be
compiled in.

Masked: one product with the concatenated adapters, of which each token keeps its own columns. It takes G times the arithmetic,
but in few large kernels with fixed shapes, which a CUDA graph can capture. For decoding, which is bound by reading weights.
Infinite weights of other adapters would reach a token, so trained banks don't use it.

Packed (packs.py): as Masked, for a CPU in bf16, with weights in oneDNN's layout.

InTurn: one route for the first tokens and another one for the rest. Decoding rows would be many ranges of one token, while the
prompts after them are a few long ranges.

BySlot: each token reads only its own adapter, in Triton kernels, for serving on a GPU. Few rows are computed one by one
(slot_kernels.py), more rows and prompts in tiles sorted by slot (slot_tile_kernels.py).

Dropped: wraps another route in training, and applies a separate dropout to each adapter's tokens.

Suffixes: T tokens of all rows, K inputs, O outputs, R rank, G slots, L layers that share an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROW_BY_ROW = 48
"""Up to this many rows, slot_kernels computes them one by one; above it, slot_tile_kernels does. With 16 adapters of rank 8 and
an 8B model's shapes on an H200, the former was faster at 32 rows and the latter at 128."""


class Route(Protocol):
    """The adapters of the tokens of one forward pass, and how their products are computed."""

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        """The outputs [T, O] of layers that share the input x, plus the adapters' part. `outs` may be changed in place. a, b: the
        bank of each layer, with G + 1 slots, of which the last is zero. whole: the joined layers; None if they are not joined."""
        ...


@dataclass(frozen=True, eq=False)
class Ranges:
    slots: tuple[int, ...]
    """The slot of each range; -1 for none."""
    lengths: tuple[int, ...]
    """The number of tokens of each range; their sum is T."""

    @classmethod
    def of(cls, slots: Sequence[int], lengths: Sequence[int]) -> Ranges:
        """The ranges of documents; neighbours with the same slot are merged."""
        runs = [
            (slot, sum(length for _, length in run)) for slot, run in groupby(zip(slots, lengths, strict=True), lambda x: x[0])
        ]
        return cls(tuple(slot for slot, _ in runs), tuple(length for _, length in runs))

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        xs = x_TK.split(self.lengths)
        parts = [list(out_TO.split(self.lengths)) for out_TO in outs]
        a_by_slot, b_by_slot = [a_GRK.unbind() for a_GRK in a], [b_GRO.unbind() for b_GRO in b]
        add = _adding()
        for number, (slot, x) in enumerate(zip(self.slots, xs, strict=True)):
            if slot < 0:
                continue
            a_of_slot = [of_layer[slot] for of_layer in a_by_slot]
            lows = (x @ _together(a_of_slot).T).split([len(a_RK) for a_RK in a_of_slot], dim=1)
            for part, low_TR, of_layer in zip(parts, lows, b_by_slot, strict=True):
                part[number] = add(part[number], low_TR, of_layer[slot])
        return list(outs) if add is Tensor.addmm_ else [torch.cat(part) for part in parts]


@dataclass(frozen=True, eq=False)
class InTurn:
    first: Route
    rest: Route
    length: int
    """The number of tokens of the first route."""

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        routes = (self.first, slice(None, self.length)), (self.rest, slice(self.length, None))
        parts = [route.add([out_TO[tokens] for out_TO in outs], x_TK[tokens], a, b, whole) for route, tokens in routes]
        if torch.is_grad_enabled():
            return [torch.cat(pair) for pair in zip(*parts, strict=True)]
        for out_TO, part in zip(outs, parts[0], strict=True):  # those of the rest, which are many, are in their place
            out_TO[: self.length].copy_(part)
        return list(outs)


@dataclass(frozen=True)
class One:
    """All tokens use one slot."""

    slot: int

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        return Ranges((self.slot,), (len(x_TK),)).add(outs, x_TK, a, b, whole)


@dataclass(frozen=True, eq=False)
class Sorted:
    ends_G1: Tensor
    """int32: the end of each slot's tokens in sorted order; tokens without an adapter come last."""
    order_T: Tensor | None
    """int64: token indices sorted by slot; None if they are already sorted."""
    places_T: Tensor | None
    """int64: each token's position in sorted order."""

    @classmethod
    def in_turn(cls, slots: Sequence[int], length: int, num_slots: int, device: torch.device) -> Sorted:
        """`length` tokens of each of these slots, which are in ascending order with -1 (none) last."""
        lengths = [length * slots.count(slot) for slot in (*range(num_slots), -1)]
        ends_G1 = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(ends_G1.to(device, non_blocking=True), None, None)

    @classmethod
    def of(cls, slot_T: Tensor, num_slots: int, *, in_order: bool = False) -> Sorted:
        """slot_T: int, -1 for none, on the computing device. in_order: slots ascend, with -1 last."""
        slot_T = torch.where(slot_T < 0, num_slots, slot_T)
        order_T = places_T = None
        if not in_order:
            slot_T, order_T = slot_T.sort(stable=True)
            places_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(len(order_T), device=order_T.device))
        every = torch.arange(num_slots + 1, device=slot_T.device, dtype=slot_T.dtype)
        return cls(torch.searchsorted(slot_T, every, right=True).int(), order_T, places_T)

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        x_TK = x_TK if self.order_T is None else x_TK.index_select(0, self.order_T)
        low_TR = grouped_product(x_TK, torch.cat(list(a), dim=1).transpose(1, 2), self.ends_G1)
        lows = low_TR.split([a_GRK.shape[1] for a_GRK in a], dim=1)
        added = [grouped_product(low, b_GRO, self.ends_G1) for low, b_GRO in zip(lows, b, strict=True)]
        if self.places_T is not None:
            added = [more_TO.index_select(0, self.places_T) for more_TO in added]
        return [out_TO + more_TO for out_TO, more_TO in zip(outs, added, strict=True)]


@dataclass(frozen=True, eq=False)
class Masked:
    mask_TG: Tensor
    """1 where the slot is the token's, else 0, in the dtype of the products."""
    slots: slice
    """The slots to compute."""

    @classmethod
    def of(cls, slot_T: Tensor, num_slots: int, dtype: torch.dtype) -> Masked:
        """On a CPU, only the slots from the first to the last used one are computed, since time depends on the bytes read. On a
        GPU all are, so that shapes are fixed and the host needs no values."""
        first, last = 0, num_slots
        if slot_T.device.type == "cpu" and (used := slot_T[slot_T >= 0]).numel():
            first, last = int(used.min()), int(used.max()) + 1
        slot_G = torch.arange(first, last, device=slot_T.device, dtype=slot_T.dtype)
        return cls((slot_T[:, None] == slot_G).to(dtype), slice(first, last))

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        T, G = self.mask_TG.shape
        a_CK = [a_GRK[self.slots].flatten(0, 1) for a_GRK in a]
        low_TLGR = (x_TK @ _together(a_CK).T).view(T, len(a), G, -1)
        low_TLC = (low_TLGR * self.mask_TG[:, None, :, None]).flatten(2)
        add, lows = _adding(), zip(outs, low_TLC.unbind(1), b, strict=True)
        return [add(out_TO, low_TC, b_GRO[self.slots].flatten(0, 1)) for out_TO, low_TC, b_GRO in lows]


@dataclass(frozen=True, eq=False)
class BySlot:
    slot_T: Tensor
    """int, on the device; -1 for none."""
    order_T: Tensor
    """int64: row indices sorted by slot."""

    @classmethod
    def of(cls, slot_T: Tensor) -> BySlot:
        return cls(slot_T, slot_T.argsort())

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        return slot_products(list(outs), x_TK, self.slot_T, self.order_T, list(a), list(b))


@dataclass(frozen=True, eq=False)
class Dropout:
    """Dropout for the inputs of one adapter's layers."""

    rate: float
    generator: torch.Generator

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Computed as torch does on a CPU, to draw the same mask from the same seed."""
        kept = 1 - self.rate
        return x_TK * torch.empty_like(x_TK).bernoulli_(kept, generator=self.generator).div_(kept)


@dataclass(frozen=True, eq=False)
class Dropped:
    route: Route
    length: int
    """The number of tokens of each part."""
    dropouts: tuple[Dropout | None, ...]
    """The dropout of each part; None: no dropout."""
    begun: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    """The generators' states at the beginning of each layer of the model."""

    def begin(self, layer: nn.Module) -> None:
        """To be called before each layer. A layer that is recomputed in the backward pass draws the same masks again."""
        generators = [dropout.generator for dropout in self.dropouts if dropout is not None]
        if layer in self.begun:
            for generator, state in zip(generators, self.begun[layer], strict=True):
                generator.set_state(state)
        else:
            self.begun[layer] = [generator.get_state() for generator in generators]

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        parts = zip(x_TK.split(self.length), self.dropouts, strict=True)
        dropped = [part_TK if dropout is None else dropout(part_TK) for part_TK, dropout in parts]
        return self.route.add(outs, torch.cat(dropped), a, b, whole)


def _adding() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(out, low, b) -> out + low @ b, in place if no gradient is needed."""
    return torch.addmm if torch.is_grad_enabled() else Tensor.addmm_


def _together(a: Sequence[Tensor]) -> Tensor:
    """a of all layers, concatenated along the rank; a single one is not copied."""
    return a[0] if len(a) == 1 else torch.cat(list(a))


@torch.library.custom_op("raytune_llm::slot_products", mutates_args=())
def slot_products(
    outs: list[Tensor], x_TK: Tensor, slot_T: Tensor, order_T: Tensor, a: list[Tensor], b: list[Tensor]
) -> list[Tensor]:
    """out + (x @ a[slot].T) @ b[slot] for each layer that shares x, where each row has its own slot."""
    if not x_TK.is_cuda:
        return [_by_row(out_TO, x_TK, slot_T, a_GRK, b_GRO) for out_TO, a_GRK, b_GRO in zip(outs, a, b, strict=True)]
    if len(x_TK) > ROW_BY_ROW:
        from raytune_llm.models.adapters import slot_tile_kernels

        return slot_tile_kernels.products(outs, x_TK.contiguous(), slot_T, order_T, a, b)
    from raytune_llm.models.adapters import slot_kernels

    return slot_kernels.products(outs, x_TK.contiguous(), slot_T, a, b)


def _by_row(out_TO: Tensor, x_TK: Tensor, slot_T: Tensor, a_GRK: Tensor, b_GRO: Tensor) -> Tensor:
    low_TR = torch.einsum("tk,trk->tr", x_TK.float(), a_GRK[slot_T].float())  # slot -1 is the last one, of zeros
    return (out_TO + torch.einsum("tr,tro->to", low_TR, b_GRO[slot_T].float())).to(out_TO.dtype)


@slot_products.register_fake
def _(outs: list[Tensor], x_TK: Tensor, slot_T: Tensor, order_T: Tensor, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(out, memory_format=torch.contiguous_format) for out in outs]


@torch.library.custom_op("raytune_llm::grouped_product", mutates_args=())
def grouped_product(x_TK: Tensor, w_GKO: Tensor, ends_G: Tensor) -> Tensor:
    """x [T, K] @ w [G, K, O], where each row is multiplied by its group's matrix. Group g has the rows ends[g - 1] to ends[g].

    A custom op, since torch.compile supports torch's grouped product for one dtype only, and its kernels need contiguous rows.
    """
    return F.grouped_mm(x_TK.contiguous(), w_GKO, offs=ends_G)


@grouped_product.register_fake
def _(x_TK: Tensor, w_GKO: Tensor, ends_G: Tensor) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], w_GKO.shape[2])


@torch.library.custom_op("raytune_llm::grouped_outer", mutates_args=())
def _grouped_outer(x_TK: Tensor, y_TO: Tensor, ends_G: Tensor) -> Tensor:
    """x.T @ y for the rows of each group: [G, K, O]."""
    return F.grouped_mm(x_TK.contiguous().T, y_TO.contiguous(), offs=ends_G)


@_grouped_outer.register_fake
def _(x_TK: Tensor, y_TO: Tensor, ends_G: Tensor) -> Tensor:
    return x_TK.new_empty(ends_G.shape[0], x_TK.shape[1], y_TO.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_TK, w_GKO, ends_G = ctx.saved_tensors
    towards_x = grouped_product(grad_TO, w_GKO.transpose(1, 2), ends_G)
    return towards_x, _grouped_outer(x_TK, grad_TO, ends_G), None


grouped_product.register_autograd(_backward, setup_context=_keep)

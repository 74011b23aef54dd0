"""Many LoRA adapters on one model, several of them in one forward pass: every linear layer has a bank of slots.

PEFT's layers compute one adapter at a time. Here, A and B of all slots are two tensors per layer, on the device. Adapters are
loaded into slots and removed between two passes, without rebuilding or recompiling anything. A route (routes.py) maps the tokens
of a pass to slots. It is passed to the layers as an argument, so a layer that is recomputed in the backward pass gets it again.

Serving uses a frozen bank: A and B in the dtype of the products, with the scale folded into B. Training several runs on one base
uses a trained bank: A and B in float32, and a separate scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig, SavedAdapter
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.bank_weights import Layout, Weights, write
from raytune_llm.models.adapters.banked import BankedLinear, BankShape, Now, join
from raytune_llm.models.adapters.grouped import group
from raytune_llm.models.adapters.method import LINEAR, sides
from raytune_llm.models.adapters.packs import Packs
from raytune_llm.models.adapters.protocol import OWN
from raytune_llm.models.adapters.routes import BySlot, Dropout, Dropped, InTurn, Masked, One, Ranges, Route, Sorted
from raytune_llm.models.adapters.saved import PREFIX
from raytune_llm.models.layers import is_passed_over, named_layers

ROUTE = "adapter_route"
"""The keyword argument with which a model's layers get the route of a forward pass."""
BY_SLOT = 256
"""Up to this many rows, BySlot is used, where each row reads only its own adapter; above it, Masked, one product with all."""
BY_SLOT_RANK = 64
"""Up to this rank, prompts of a frozen bank use BySlot, which adds to the outputs in one pass; above it, Sorted, since tiles of
more ranks would not fit the registers."""
ALIGNED = 8
"""Slots' ranks are padded to multiples of this, since grouped products need rows of at least 16 bytes."""


class LoraBank:
    """Implements `Adapters` with several adapters in one forward pass; LoRA and rsLoRA only."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        targets: Sequence[str] | None = None,
        last_layers: int | None = None,
        trains: bool = False,
    ) -> None:
        """Wrap the linear layers, quantized or not, of a transformers model without adapters.

        dtype: the dtype of the adapters' products. targets: the last parts of the names of the layers that adapters may be on;
        None: every linear layer in the model's layers. last_layers: only in this many last layers. Each wrapped layer has slots
        of rank max_rank, and takes two more products per pass.
        """
        self.model = self._base = model
        self.num_slots, self._dtype, self._now = num_slots, dtype, Now()
        self._shape = BankShape(num_slots, -(-max_rank // ALIGNED) * ALIGNED, torch.float32 if trains else dtype, trains)
        self._layers = self._wrap(targets, last_layers)
        self._layout = Layout({name: sides(layer.base_layer) for name, layer in self._layers.items()}, self._shape)
        on_gpu = next(iter(self._layers.values())).a_GRK.is_cuda
        self._page_locked = PageLocked(self._layout.numel, self._shape.dtype) if on_gpu else None
        self._held: dict[int, Weights] = {}
        self._slots: dict[str, int] = {}
        self._views: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self._default: Route | None = None
        self._packs: Packs | None = None
        group(model)
        for _, layer in named_layers(model):
            layer.register_forward_pre_hook(self._see_route, with_kwargs=True)
            for part in layer.children():
                # Attention gets its layer's arguments, and is called again when its layer is recomputed.
                part.register_forward_pre_hook(self._take_route, with_kwargs=True)

    def join(self) -> None:
        """Join the adapters of layers whose products have been joined (models/packed.py), such as q, k and v. A route for
        decoding is then for one pass only, since it holds copies of the adapters."""
        self._packs = Packs(join(list(self._layers.values())))
        self._views.clear()

    # Slots ---------------------------------------------------------------------------------------------------------------

    def read(self, folder: str | Path, *, setting: str = "the adapter") -> Weights:
        """Read an adapter's folder; may be called on any thread. Raises ConfigError if the adapter doesn't fit the model or a
        slot."""
        return self._layout.read(folder, setting)

    @torch.no_grad()
    def load(self, slot: int, weights: Weights | str | Path) -> None:
        """Load an adapter into a slot and overwrite what was there. To be called between two forward passes."""
        if not isinstance(weights, Weights):
            weights = self.read(weights)
        self.clear(slot)
        views = self._views_of(slot)
        places = [view[:rank] for name, rank in weights.ranks.items() for view in views[name]]
        device = places[0].device
        flat = weights.flat.to(device) if self._page_locked is None else self._page_locked.to(device, weights.flat)
        values = flat.split([place.numel() for place in places])
        torch._foreach_copy_(places, [value.view(place.shape) for value, place in zip(values, places, strict=True)])
        for name, scale in weights.scales.items():
            scale_G11 = self._layers[name].scale_G11
            if scale_G11 is not None:
                scale_G11[slot] = scale
        self._held[slot] = weights

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        assert 0 <= slot < self.num_slots, slot
        torch._foreach_zero_([view for views in self._views_of(slot).values() for view in views])
        self._held.pop(slot, None)

    def draw(self, slot: int, section: AdapterConfig, seed: int) -> None:
        """Initialize a new adapter in the slot, with the values that a separate run with this seed has."""
        self.load(slot, self._layout.drawn(self._base, section, seed, self._dtype))

    # Routes: which token goes to which slot --------------------------------------------------------------------------------

    def by_documents(self, slot_M: Tensor, cu_seqlens_S: Tensor, num_tokens: int, *, in_order: bool = False) -> dict[str, Route]:
        """The layers' arguments for packs and long prompts. slot_M: the slot of each document, -1 for none. in_order: slots
        ascend and documents without one come last, so tokens need no sorting."""
        if cu_seqlens_S.device.type == "cpu":
            return {ROUTE: self._by_ranges(slot_M, cu_seqlens_S.diff().tolist())}
        slot_T = slot_M.to(cu_seqlens_S.device).repeat_interleave(cu_seqlens_S.diff(), output_size=num_tokens)
        return {ROUTE: self._of_prompts(slot_T, in_order=in_order)}

    def _by_ranges(self, slot_M: Tensor, lengths: list[int]) -> Route:
        """The route on a CPU. Documents of one token at the beginning are decoding rows, with a route of their own."""
        rows = sum(1 for _ in takewhile(lambda length: length == 1, lengths))
        if rows < 2 or self._shape.trains or not (slot_M[:rows] >= 0).any():
            return Ranges.of(slot_M.tolist(), lengths)
        return InTurn(self._of_rows(slot_M[:rows]), Ranges.of(slot_M[rows:].tolist(), lengths[rows:]), rows)

    def by_slots(self, slot_T: Tensor) -> dict[str, Route]:
        """The layers' arguments for prompts on a GPU. slot_T: the slot of each token, on the device, -1 for none. No value is
        read on the host, so a CUDA graph can capture it."""
        return {ROUTE: self._of_prompts(slot_T)}

    def _of_prompts(self, slot_T: Tensor, *, in_order: bool = False) -> Route:
        if self._shape.trains or self._shape.rank > BY_SLOT_RANK:
            return Sorted.of(slot_T, self.num_slots, in_order=in_order)
        return BySlot.of(slot_T)

    def in_turn(self, slots: Sequence[int], length: int, dropouts: Sequence[Dropout | None] = ()) -> dict[str, Route]:
        """The layers' arguments for several runs over the same packs: `length` tokens for each of these slots, in ascending order
        with -1 (none) last. dropouts: one for each slot."""
        device = next(iter(self._layers.values())).a_GRK.device
        if device.type == "cpu":
            route: Route = Ranges.of(slots, [length] * len(slots))
        else:
            route = Sorted.in_turn(slots, length, self.num_slots, device)
        return {ROUTE: Dropped(route, length, tuple(dropouts)) if any(dropouts) else route}

    def by_tokens(self, slot_T: Tensor) -> dict[str, Route]:
        """The layers' arguments for decoding, with one token per row. slot_T: on the device, -1 for none. A CUDA graph can
        capture it."""
        if slot_T.is_cuda and len(slot_T) <= BY_SLOT and not self._shape.trains:
            return {ROUTE: BySlot.of(slot_T)}
        return {ROUTE: self._of_rows(slot_T)}

    def _of_rows(self, slot_T: Tensor) -> Route:
        if self._packs is not None:
            return self._packs.route(slot_T, self._held, self.num_slots)
        return Masked.of(slot_T, self.num_slots, self._dtype)

    # Adapters by name ------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> PreTrainedModel:
        return self._base

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    @property
    def slots(self) -> Mapping[str, int]:
        """Adapter name -> slot."""
        return self._slots

    @property
    def max_rank(self) -> int:
        """The highest rank that a slot has room for."""
        return self._shape.rank

    def described(self, device_type: str) -> str | None:
        return f"{self.num_slots} slots of rank {self.max_rank}, several adapters in one pass"

    def add(self, name: str, source: AdapterConfig | SavedAdapter, *, seed: int = 0) -> None:
        """Load or initialize an adapter in a free slot. seed: for a new one. Raises ConfigError if all slots are taken."""
        assert name not in self._slots, name
        slot = next((slot for slot in range(self.num_slots) if slot not in self._held), None)
        if slot is None:
            raise ConfigError("the adapter", f"can't be added: all {self.num_slots} slots are taken", got=name)
        if source.path is None:
            assert not isinstance(source, SavedAdapter)
            self.draw(slot, source, seed)
        else:
            setting = source.setting if isinstance(source, SavedAdapter) else "adapter.path"
            self.load(slot, self.read(source.path, setting=setting))
        self._slots[name] = slot

    def quantized(self) -> None:
        """Nothing to do: plain LoRA does not read the base's weights."""

    def remove(self, name: str) -> None:
        self.clear(self._slots.pop(name))

    def save(
        self, name: str, folder: Path, *, base_model: str | None = None, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the folder as PEFT does. parameters: values to save instead of the bank's, named as in `part`."""
        slot, given = self._slots[name], parameters or {}
        held, tensors = self._held[slot], {}
        for layer, rank in held.ranks.items():
            a_RK, b_RO = self._places(slot, layer, rank)
            if (names := _in_peft(layer))[0] in given:
                a_RK, b_RO = given[names[0]], given[names[1]].T
            scaled = 1.0 if self._shape.trains else held.scales[layer]
            tensors[layer] = a_RK.cpu().clone(), (b_RO.float() / scaled).to(b_RO.dtype).T.cpu()
        write(folder, held.config, tensors, base_model=base_model)

    def part(self, name: str, *, gradient: bool = False) -> dict[str, Tensor]:
        """Views of the adapter's A [r, K] and B [O, r] in the bank, or of their gradients, by the names of the parameters in a
        separate run."""
        slot, found = self._slots[name], {}
        for layer, rank in self._held[slot].ranks.items():
            banked = self._layers[layer]
            a_GRK, b_GRO = (banked.a_GRK.grad, banked.b_GRO.grad) if gradient else (banked.a_GRK.detach(), banked.b_GRO.detach())
            assert a_GRK is not None and b_GRO is not None
            found |= zip(_in_peft(layer), (a_GRK[slot, :rank], b_GRO[slot, :rank].T), strict=True)
        return found

    @torch.no_grad()
    def resize(self, num_slots: int) -> None:
        """Change the number of slots; adapters move to the first ones, in their order. To be called between two steps, when
        gradients are no longer needed."""
        taken = sorted(self._held)
        assert len(taken) <= num_slots
        for layer in self._layers.values():
            layer.resize(num_slots, taken)
        self._views.clear()
        slot_of = {old: new for new, old in enumerate(taken)}
        self._held = {slot_of[slot]: held for slot, held in self._held.items()}
        self._slots = {name: slot_of[slot] for name, slot in self._slots.items()}
        self.num_slots, self._shape = num_slots, self._shape._replace(num_slots=num_slots)
        self._layout = replace(self._layout, shape=self._shape)

    def trained(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of the whole bank; one adapter is a part of each of them."""
        assert name in self._slots, name
        return {own: parameter for own, parameter in self._base.named_parameters() if parameter.requires_grad}

    def observer(self) -> None:
        return None

    def lr_factor(self, name: str) -> float:
        return 1.0

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """A context in which passes without a route use this adapter."""
        before, self._default = self._default, None if name is None else One(self._slots[name])
        try:
            yield
        finally:
            self._default = before

    # Within ----------------------------------------------------------------------------------------------------------------

    def _wrap(self, targets: Sequence[str] | None, last_layers: int | None) -> dict[str, BankedLinear]:
        """Replace each targeted linear layer by a BankedLinear around it. Raises ConfigError if there is none."""
        self._base.requires_grad_(False)
        wrapped: dict[str, BankedLinear] = {}
        for layer_name, layer in list(named_layers(self._base))[-(last_layers or 0) :]:
            for parent_name, parent in list(layer.named_modules(prefix=layer_name)):
                for name, child in list(parent.named_children()):
                    wanted = isinstance(child, LINEAR) and (targets is None or name in targets)
                    if wanted and not is_passed_over(parent, name, child):
                        wrapped[f"{parent_name}.{name}"] = made = BankedLinear(child, *sides(child), self._shape, self._now)
                        setattr(parent, name, made)
        if not wrapped:
            raise ConfigError("adapter.targets", "must name linear layers in the model's layers", got=targets)
        return wrapped

    def _see_route(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._now.route = route = kwargs.get(ROUTE, self._default)
        if isinstance(route, Dropped):
            route.begin(layer)

    def _take_route(self, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if ROUTE not in kwargs:
            return None
        self._now.route = kwargs[ROUTE]
        return args, {name: value for name, value in kwargs.items() if name != ROUTE}

    def _places(self, slot: int, name: str, rank: int) -> tuple[Tensor, Tensor]:
        a_RK, b_RO = self._views_of(slot)[name]
        return a_RK[:rank], b_RO[:rank]

    def _views_of(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> views of the slot's a and b. Cached: creating hundreds of views takes milliseconds, which delays other
        requests."""
        if slot not in self._views:
            self._views[slot] = {
                name: (layer.a_GRK.detach()[slot], layer.b_GRO.detach()[slot]) for name, layer in self._layers.items()
            }
        return self._views[slot]


class PageLocked:
    """Page-locked memory, from which a GPU copies without the host waiting. It is allocated once: while memory is being locked,
    no other thread of the process can start a kernel (36 ms for an adapter of rank 8 of an 8B model)."""

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self._memory = torch.empty(numel, dtype=dtype, pin_memory=True)
        self._copied = torch.cuda.Event()

    def to(self, device: torch.device, flat: Tensor) -> Tensor:
        self._copied.synchronize()  # the copy before has left the memory
        copied = self._memory[: flat.numel()].copy_(flat).to(device, non_blocking=True)
        self._copied.record()
        return copied


def _in_peft(layer: str) -> tuple[str, str]:
    """The names of the layer's A and B in PEFT's model."""
    return f"{PREFIX}{layer}.lora_A.{OWN}.weight", f"{PREFIX}{layer}.lora_B.{OWN}.weight"

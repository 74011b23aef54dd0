"""One pass through the layers for several runs over one base: the same batch for each, with an adapter of its own in a bank.

Each run's stage is given a model of its own (OneOfSeveral) and calls it as if it were alone. The first that asks about a batch
has the layers compute it for all, or for as many as there is room for (`in_turn`); each then makes values of its own rows' last
hidden states. What goes back from one run's loss comes to its rows alone, so one backward pass from the sum of all losses gives
each adapter the gradient that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.adapters.routes import Dropout
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.head import TokenFunction
from raytune_llm.records import Batch, Prefixes

T = TypeVar("T")


class SharedPass:
    def __init__(self, policy: CausalLM, *, at_once: int | None = None) -> None:
        """policy: one whose adapters are a bank. at_once: how many a pass is of, at most; None: all that are in the bank."""
        bank = policy.adapters
        assert isinstance(bank, LoraBank)
        self.policy, self.bank = policy, bank
        self._at_once = at_once
        self._together: list[OneOfSeveral] = []
        self._hidden: dict[tuple[int, bool], tuple[Batch, list[Tensor]]] = {}
        """By batch, and whether it is to be trained on: the batch, and each run's last hidden states."""
        self._base_hidden: dict[int, tuple[Batch, Tensor]] = {}
        self._routes: dict[tuple[int, ...], Any] = {}
        self._drawn_for: tuple[bool, tuple[int, ...]] | None = None
        """Whether it was to be trained on, and the samples of the batch that dropout was last seeded for."""

    @property
    def _most(self) -> int:
        return min(self._at_once or self.bank.num_slots, self.bank.num_slots)

    def in_turn(self, members: Sequence[T], model_of: Callable[[T], OneOfSeveral]) -> list[list[T]]:
        """The members of each pass."""
        members = sorted(members, key=lambda member: self.bank.slots[model_of(member).name])
        return [members[at : at + self._most] for at in range(0, len(members), self._most)]

    @contextmanager
    def of(self, members: Sequence[OneOfSeveral]) -> Iterator[None]:
        """A context in which all of these are asked about the same batches, which are forgotten at its end."""
        self._together = sorted(members, key=lambda member: self.bank.slots[member.name])
        try:
            yield
        finally:
            self._together = []
            self.forget()

    def forget(self) -> None:
        """Batches that were computed: call it once their gradients are there."""
        self._hidden.clear()
        self._base_hidden.clear()
        self._drawn_for = None

    def values(self, member: OneOfSeveral, batch: Batch, token_function: TokenFunction, *, beside_reference: bool) -> Tensor:
        other_BTD = self._of_base(batch) if beside_reference else None
        return self.policy.values(self._of_member(member, batch), batch, token_function, other_BTD)

    def _of_member(self, member: OneOfSeveral, batch: Batch) -> Tensor:
        key = id(batch.ids_BT), torch.is_grad_enabled()
        if key not in self._hidden:
            self._hidden[key] = batch, self._compute(batch)
        return self._hidden[key][1][self._together.index(member)]

    def _compute(self, batch: Batch) -> list[Tensor]:
        """Compiled layers, which are compiled for each shape, always compute as many rows as a pass may have."""
        self._seed_dropout(batch)
        count = len(self._together)
        copies = self._most if self.policy.compiled else count
        slots = [self.bank.slots[member.name] for member in self._together] + [-1] * (copies - count)
        dropouts = [member.dropout if self.policy.training else None for member in self._together] + [None] * (copies - count)
        drops = any(dropouts)
        route = self._route(slots, batch.ids_BT.numel(), dropouts if drops else ())
        hidden = self.policy.hidden(repeated(batch, copies), route, holds_route=not drops)
        return list(hidden.chunk(copies)[:count])

    def _route(self, slots: Sequence[int], length: int, dropouts: Sequence[Dropout | None]) -> Any:
        """One object for the passes of these slots, but where it draws."""
        if dropouts:
            return self.bank.in_turn(slots, length, dropouts)
        key = self.bank.num_slots, length, *slots
        if key not in self._routes:
            self._routes[key] = self.bank.in_turn(slots, length)
        return self._routes[key]

    def _seed_dropout(self, batch: Batch) -> None:
        """A batch beside another one, of the same samples, draws on."""
        drawn_for = torch.is_grad_enabled(), batch.sample_ids
        if drawn_for != self._drawn_for:
            self._drawn_for = drawn_for
            for member in self._together:
                member.seed_dropout(batch)

    @torch.no_grad()
    def _of_base(self, batch: Batch) -> Tensor:
        if (key := id(batch.ids_BT)) not in self._base_hidden:
            self._base_hidden[key] = batch, self.policy.hidden(batch, {})
        return self._base_hidden[key][1]

    @property
    def shared(self) -> bool:
        """Whether it computes for several now."""
        return bool(self._together)


class OneOfSeveral(nn.Module):
    """What the stage of one run calls."""

    def __init__(self, pass_: SharedPass, name: str, dropout: Dropout | None) -> None:
        """name: of its adapter in the bank."""
        super().__init__()
        self._pass, self.name, self.dropout = pass_, name, dropout
        self.seed = 0
        """The seed of this step's batches."""

    def train(self, mode: bool = True) -> OneOfSeveral:
        self._pass.policy.train(mode)
        return super().train(mode)

    def seed_dropout(self, batch: Batch) -> None:
        """As that of a run that is alone is seeded (train/dropout.py)."""
        if self.dropout is not None:
            self.dropout.generator.manual_seed(hash((self.seed, batch.sample_ids)))

    def forward(self, batch: Batch, token_function: TokenFunction, *, beside_reference: bool = False) -> Any:
        """As a CausalLM's. Outside of `SharedPass.of`, with the adapter that is in use."""
        if not self._pass.shared:
            return self._pass.policy(batch, token_function, beside_reference=beside_reference)
        return self._pass.values(self, batch, token_function, beside_reference=beside_reference)


def repeated(batch: Batch, copies: int) -> Batch:
    """The batch so many times, one after another, as the layers see it."""
    L = batch.ids_BT.numel()
    return replace(
        batch,
        ids_BT=batch.ids_BT.repeat(copies, 1),
        positions_BT=batch.positions_BT.repeat(copies, 1),
        cu_seqlens_S=_bounds(batch.cu_seqlens_S, copies, L),
        prefixes=None if batch.prefixes is None else _repeated(batch.prefixes, copies, L),
    )


def _repeated(prefixes: Prefixes, copies: int, length: int) -> Prefixes:
    return prefixes._replace(
        queries_Q=_places(prefixes.queries_Q, copies, length),
        keys_K=_places(prefixes.keys_K, copies, length),
        cu_queries_X=_bounds(prefixes.cu_queries_X, copies, len(prefixes.queries_Q)),
        cu_keys_X=_bounds(prefixes.cu_keys_X, copies, len(prefixes.keys_K)),
    )


def _places(places_X: Tensor, copies: int, length: int) -> Tensor:
    firsts = torch.arange(copies, device=places_X.device, dtype=places_X.dtype) * length
    return (firsts[:, None] + places_X).flatten()


def _bounds(bounds_S: Tensor, copies: int, length: int) -> Tensor:
    """Boundaries of `copies` pieces of this length one after another, each with the boundaries bounds_S, from 0 to its length."""
    return torch.cat([_places(bounds_S[:-1], copies, length), bounds_S.new_full((1,), copies * length)])

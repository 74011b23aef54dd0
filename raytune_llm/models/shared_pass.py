"""One pass through the layers for several runs over one base: the same batch for each run, with the run's adapter in a bank.

The stage of each run gets a model of its own (OneOfSeveral) and calls it as usual. The first call for a batch computes the layers
for all runs, or for as many as fit in memory (`in_turn`). Each run then computes its values from the last hidden states of its
own rows. The gradient of a run's loss only reaches its own rows, so one backward pass from the sum of all losses gives each
adapter the same gradient as a separate run.
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
        """policy: a policy whose adapters are a bank. at_once: the maximum number of runs in a pass; None: all in the bank."""
        bank = policy.adapters
        assert isinstance(bank, LoraBank)
        self.policy, self.bank = policy, bank
        self._at_once = at_once
        self._together: list[OneOfSeveral] = []
        self._hidden: dict[tuple[int, bool], tuple[Batch, list[Tensor]]] = {}
        """(batch, whether it is trained on) -> the batch and each run's last hidden states."""
        self._base_hidden: dict[int, tuple[Batch, Tensor]] = {}
        self._routes: dict[tuple[int, ...], Any] = {}
        self._drawn_for: tuple[bool, tuple[int, ...]] | None = None
        """Whether the batch that dropout was last seeded for is trained on, and its samples."""

    @property
    def _most(self) -> int:
        return min(self._at_once or self.bank.num_slots, self.bank.num_slots)

    def in_turn(self, members: Sequence[T], model_of: Callable[[T], OneOfSeveral]) -> list[list[T]]:
        """The members, divided into passes."""
        members = sorted(members, key=lambda member: self.bank.slots[model_of(member).name])
        return [members[at : at + self._most] for at in range(0, len(members), self._most)]

    @contextmanager
    def of(self, members: Sequence[OneOfSeveral]) -> Iterator[None]:
        """A context in which all these runs compute the same batches. The cache is cleared at its end."""
        self._together = sorted(members, key=lambda member: self.bank.slots[member.name])
        try:
            yield
        finally:
            self._together = []
            self.forget()

    def forget(self) -> None:
        """Clear the cache of computed batches. Call it after their backward pass."""
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
        """The last hidden states of each run. Compiled layers always compute the maximum number of rows, since they are compiled
        for each shape."""
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
        """The route for these slots. It is one object for all passes, except with dropout."""
        if dropouts:
            return self.bank.in_turn(slots, length, dropouts)
        key = self.bank.num_slots, length, *slots
        if key not in self._routes:
            self._routes[key] = self.bank.in_turn(slots, length)
        return self._routes[key]

    def _seed_dropout(self, batch: Batch) -> None:
        """Seed dropout for a batch. A second batch of the same samples (Batch.beside) continues with the same generators."""
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
        """Whether passes are currently shared by several runs."""
        return bool(self._together)


class OneOfSeveral(nn.Module):
    """The model that the stage of one run calls."""

    def __init__(self, pass_: SharedPass, name: str, dropout: Dropout | None) -> None:
        """name: the name of the run's adapter in the bank."""
        super().__init__()
        self._pass, self.name, self.dropout = pass_, name, dropout
        self.seed = 0
        """The seed of this step's batches."""

    def train(self, mode: bool = True) -> OneOfSeveral:
        self._pass.policy.train(mode)
        return super().train(mode)

    def seed_dropout(self, batch: Batch) -> None:
        """Seed dropout as in a separate run (train/dropout.py)."""
        if self.dropout is not None:
            self.dropout.generator.manual_seed(hash((self.seed, batch.sample_ids)))

    def forward(self, batch: Batch, token_function: TokenFunction, *, beside_reference: bool = False) -> Any:
        """Like CausalLM.forward. Outside `SharedPass.of`, it computes with the adapter in use."""
        if not self._pass.shared:
            return self._pass.policy(batch, token_function, beside_reference=beside_reference)
        return self._pass.values(self, batch, token_function, beside_reference=beside_reference)


def repeated(batch: Batch, copies: int) -> Batch:
    """The batch repeated `copies` times, as the layers see it."""
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

"""LoRA whose A begins as the principal directions of its layer's inputs (Paischer et al. 2024, arXiv 2410.07170).

B is 0, so the policy is the base before the first step. Ranks stay as they are set: PEFT's rho=1. The decomposition is PEFT's,
incremental: no more than a pass's inputs of one layer are held. It is saved as plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from raytune_llm.models.adapters.lora import continues, describes, lora, lr_factor, ranks_fit
from raytune_llm.models.adapters.method import Layers, Method, only_linear

SVD_SEED = 42
"""PEFT's, of the randomized decomposition."""


def config(*, rows: int, **settings: Any) -> Any:
    return lora(**settings)


def check(layers: Layers, *, rows: int, **settings: Any) -> None:
    only_linear(layers, "eva")
    ranks_fit(layers, spares_gates=False, **settings)


class Inputs:
    """Implements `Observer`: the principal components of the inputs of each layer with an adapter.

    Layers that get one tensor for an input (q, k and v) share its components. A layer that has seen fewer tokens than twice its
    rank (a rare expert) stays as LoRA begins.
    """

    def __init__(self, model: nn.Module, key: str) -> None:
        self._key = key
        adapted = [module for module in model.modules() if isinstance(module, LoraLayer) and key in module.lora_A]
        self._layers: list[Any] = adapted
        self._components: dict[Any, Components] = {}

    @contextmanager
    def watching(self, tokens_N: Tensor, num_tokens: int) -> Iterator[None]:
        latest: list[tuple[Tensor, Components]] = []

        def see(layer: Any, base: nn.Module, given: tuple[Tensor, ...]) -> None:
            rank, x = layer.r[self._key], given[0]
            if latest and latest[0][0] is x and latest[0][1].rank == rank:
                self._components[layer] = latest[0][1]
                return
            own = self._components.get(layer) or Components(rank, x.shape[-1])
            inputs_LK = x.detach().flatten(0, -2)
            own.add(inputs_LK[tokens_N] if len(inputs_LK) == num_tokens else inputs_LK)
            self._components[layer] = own
            latest[:] = [(x, own)]

        with ExitStack() as hooks:
            for layer in self._layers:
                hook = layer.get_base_layer().register_forward_pre_hook(partial(see, layer))
                hooks.callback(hook.remove)
            # A compiled layer would compile what hooks do.
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def values(self) -> list[tuple[nn.Parameter, Tensor]]:
        found = ((layer, components.directions()) for layer, components in self._components.items())
        return [(layer.lora_A[self._key].weight, rows_RK) for layer, rows_RK in found if rows_RK is not None]


class Components:
    """The directions, by variance, of vectors that come in pieces."""

    def __init__(self, rank: int, size: int) -> None:
        """size: K, of a vector."""
        self.rank, self._least = rank, min(2 * rank, size)
        self._pca = IncrementalPCA(rank, copy=True, lowrank=True, lowrank_q=self._least, lowrank_seed=SVD_SEED)
        self._waiting: list[Tensor] = []

    def add(self, x_NK: Tensor) -> None:
        """A decomposition finds twice the rank, of no fewer vectors; fewer wait for the next ones."""
        self._waiting.append(x_NK)
        if sum(map(len, self._waiting)) >= self._least:
            with torch.autocast(x_NK.device.type, enabled=False):
                self._pca.partial_fit(torch.cat(self._waiting).float())
            self._waiting = []

    def directions(self) -> Tensor | None:
        """[R, K] float32, of length 1; None before there were enough vectors."""
        return getattr(self._pca, "components_", None)


EVA = Method(config=config, describes=describes, check=check, continues=continues, observer=Inputs, lr_factor=lr_factor)

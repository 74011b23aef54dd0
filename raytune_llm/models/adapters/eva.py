"""EVA: LoRA whose A is initialized as the principal directions of its layer's inputs (Paischer et al. 2024, arXiv 2410.07170).

B is 0, so the policy equals the base before the first step. Ranks are not redistributed (PEFT's rho=1). PEFT's incremental PCA
keeps only one layer's inputs of one pass in memory. The adapter is saved as plain LoRA.
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
"""PEFT's seed of the randomized decomposition."""


def config(*, rows: int, **settings: Any) -> Any:
    return lora(**settings)


def check(layers: Layers, *, rows: int, **settings: Any) -> None:
    only_linear(layers, "eva")
    ranks_fit(layers, spares_gates=False, **settings)


class Inputs:
    """Implements `Observer`: the principal components of the inputs of each layer with an adapter.

    Layers with the same input tensor (q, k and v) share its components. A layer that has seen fewer tokens than twice its rank (a
    rarely used expert) keeps LoRA's initialization.
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
            # torch.compile would otherwise trace the hook.
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def values(self) -> list[tuple[nn.Parameter, Tensor]]:
        found = ((layer, components.directions()) for layer, components in self._components.items())
        return [(layer.lora_A[self._key].weight, rows_RK) for layer, rows_RK in found if rows_RK is not None]


class Components:
    """The principal directions of vectors that arrive in parts."""

    def __init__(self, rank: int, size: int) -> None:
        """size: the number of elements K of a vector."""
        self.rank, self._least = rank, min(2 * rank, size)
        self._pca = IncrementalPCA(rank, copy=True, lowrank=True, lowrank_q=self._least, lowrank_seed=SVD_SEED)
        self._waiting: list[Tensor] = []

    def add(self, x_NK: Tensor) -> None:
        """Add vectors. A decomposition computes 2 * rank directions, so it waits until there are that many vectors."""
        self._waiting.append(x_NK)
        if sum(map(len, self._waiting)) >= self._least:
            with torch.autocast(x_NK.device.type, enabled=False):
                self._pca.partial_fit(torch.cat(self._waiting).float())
            self._waiting = []

    def directions(self) -> Tensor | None:
        """[R, K] float32 unit vectors; None before there were enough vectors."""
        return getattr(self._pca, "components_", None)


EVA = Method(config=config, describes=describes, check=check, continues=continues, observer=Inputs, lr_factor=lr_factor)

"""Computes the frozen layers before the first trained one only once for each batch.

Their output is the same whenever the batch comes again: at every evaluation, in every epoch, in every trial over one base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.models.layers import frozen_first
from raytune_llm.models.multimodal import text_model
from raytune_llm.records import Batch

IN_A_ROW = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Models in which a layer's only input from earlier layers is the hidden states of the layer before it."""
MOST_BYTES = 256 * 2**20
"""Maximum bytes of cached hidden states for training batches, and the same again for other batches."""
Key = tuple[int, bool, bool, bytes]
"""(number of layers, whether the batch is trained on, whether the model is in training mode, what the layers see of the batch).
In training mode, attention may be another one."""


class KnownStates:
    """A cache of batches' hidden states. When it is full, the first batches stay, since batches come again in the same order."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._states: dict[Key, Tensor] = {}
        self._room = {True: most_bytes, False: most_bytes}

    def get(self, key: Key) -> Tensor | None:
        return self._states.get(key)

    def add(self, key: Key, hidden_BTD: Tensor) -> None:
        _, trained, *_ = key
        self._room[trained] -= (size := hidden_BTD.numel() * hidden_BTD.element_size())
        if self._room[trained] >= 0:
            self._states[key] = hidden_BTD.detach()
        else:
            self._room[trained] += size


class FrozenStart:
    """The frozen layers at a model's start."""

    def __init__(self, layers: nn.ModuleList, count: int, known: KnownStates, *, trains_again: bool) -> None:
        """known: the cache, shared by models with the same weights in these layers. trains_again: batches are trained on more
        than once."""
        self.layers, self.count = layers, count
        self._known, self._trains_again = known, trains_again

    def __str__(self) -> str:
        return f"the first {self.count} of {len(self.layers)} are frozen, and computed once for each batch"

    @contextmanager
    def once(self, batch: Batch, *, training: bool) -> Iterator[None]:
        """A context for a forward pass in which these layers are computed only if the batch is not in the cache. training: the
        model's mode."""
        trained = torch.is_grad_enabled()
        key = self.count, trained, training, _seen_by_layers(batch)
        known_BTD = self._known.get(key)
        if known_BTD is not None:
            with self._replaced(known_BTD):
                yield
        elif trained and not self._trains_again:
            yield
        else:

            def keep(layer: nn.Module, given: Any, out_BTD: Any) -> None:
                self._known.add(key, out_BTD)

            hook = self.layers[self.count - 1].register_forward_hook(keep)
            try:
                yield
            finally:
                hook.remove()

    @contextmanager
    def _replaced(self, known_BTD: Tensor) -> Iterator[None]:
        own = list(self.layers[: self.count])
        for number in range(self.count):
            self.layers[number] = _Known(known_BTD)
        try:
            yield
        finally:
            for number, layer in enumerate(own):
                self.layers[number] = layer


class _Known(nn.Module):
    """Replaces layers whose output is known."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self._hidden_BTD = hidden_BTD

    def forward(self, *args: Any, **others: Any) -> Tensor:
        return self._hidden_BTD


def frozen_start(base: PreTrainedModel, known: KnownStates, *, trains_again: bool) -> FrozenStart | None:
    """The frozen start of a model; None if its first layer or something before it is trained, or if its family is not in
    IN_A_ROW.

    base: a transformers model with its adapters, with requires_grad set as it is trained.
    """
    text: Any = text_model(base)
    count = once_for_each_batch(base)
    return FrozenStart(text.layers, count, known, trains_again=trains_again) if count else None


def once_for_each_batch(base: PreTrainedModel) -> int:
    """The number of layers that can be."""
    text: Any = text_model(base)
    if type(text).__name__ not in IN_A_ROW:
        return 0
    count = len(frozen_first(base))
    return count if count < len(text.layers) else 0


def kept_bytes(batches: int, batch_bytes: int) -> int:
    """The memory for the outputs of this many batches, within MOST_BYTES. batch_bytes: the size of one batch's hidden states."""
    return min(batches, MOST_BYTES // max(batch_bytes, 1)) * batch_bytes


def _seen_by_layers(batch: Batch) -> bytes:
    shape = torch.tensor(batch.ids_BT.shape)
    prefixes = [part for part in batch.prefixes or () if isinstance(part, Tensor)]
    parts = (shape, batch.ids_BT, batch.positions_BT, batch.cu_seqlens_S, *prefixes)
    return b"".join(part.numpy(force=True).tobytes() for part in parts)

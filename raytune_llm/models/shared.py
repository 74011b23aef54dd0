"""A base model that is loaded once for several consecutive runs in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from raytune_llm.models.frozen_start import KnownStates


class SharedModel:
    """Keeps one model as it was loaded. A copy has its own modules and buffers, which adapters, attention and compilation may
    change, but it shares the weights, which must not change: copies are for frozen bases."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._model: PreTrainedModel | None = None
        self.known = KnownStates()
        """A cache of the first layers' outputs for batches that copies have computed."""

    def copy_of(self, key: str, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """A copy of the model. key: everything that determines the weights. If it changes, the kept model is dropped before the
        new one is loaded."""
        if self._model is None or key != self._key:
            self._key = self._model = None
            self.known = KnownStates()
            self._model, self._key = load(), key
        shared = {
            id(weight): nn.Parameter(weight.detach(), requires_grad=weight.requires_grad) for weight in self._model.parameters()
        }
        return copy.deepcopy(self._model, shared)  # type: ignore[arg-type]  # its memo: what is in it is not copied

"""A base model that is loaded once for all that are made of it, one after another, in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from raytune_llm.models.frozen_start import KnownStates


class SharedModel:
    """Keeps one model as it was loaded. What `copy_of` gives has modules and buffers of its own, which adapters, attention and
    compilation may change as they like, and the kept model's weights, which must stay as they are: they are for frozen bases."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._model: PreTrainedModel | None = None
        self.known = KnownStates()
        """What its layers give for batches that its copies computed."""

    def copy_of(self, key: str, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """key: all that decides the weights. Another one takes the place of the kept one, which goes first."""
        if self._model is None or key != self._key:
            self._key = self._model = None
            self.known = KnownStates()
            self._model, self._key = load(), key
        shared = {
            id(weight): nn.Parameter(weight.detach(), requires_grad=weight.requires_grad) for weight in self._model.parameters()
        }
        return copy.deepcopy(self._model, shared)  # type: ignore[arg-type]  # its memo: what is in it is not copied

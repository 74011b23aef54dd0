"""The protocol of adapters for the rest of the package. PEFT's classes and the methods stay in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig, SavedAdapter

OWN = "default"
"""The name of the adapter that a policy was built with."""


class Observer(Protocol):
    """Sees the inputs of layers, from which a new adapter begins."""

    def watching(self, tokens_N: Tensor, num_tokens: int) -> AbstractContextManager[None]:
        """A context of one forward pass of the base over num_tokens tokens, of which these (int64, flat positions) count."""
        ...

    def values(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters of the adapter, and the whole tensors that they begin as. Parameters may be sharded, tensors are not."""
        ...


class Adapters(Protocol):
    """The adapters in the layers of one model, by name. One of them is in use, or none."""

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, with what adapters have put into its layers."""
        ...

    @property
    def model(self) -> Any:
        """What a forward pass calls: the base, or PEFT's model around it."""
        ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def max_rank(self) -> int:
        """The largest rank of a layer; 0 without low-rank adapters."""
        ...

    def described(self, device_type: str) -> str | None:
        """How they are computed on this device, in words; None without any."""
        ...

    def add(self, name: str, source: AdapterConfig | SavedAdapter) -> None:
        """Add a new adapter by its settings, or a saved one. It is frozen, and the adapter in use does not change.

        Raises ConfigError for a folder that holds no adapter of this model, and for settings that don't fit the model.
        """
        ...

    def remove(self, name: str) -> None: ...

    def save(
        self, name: str, folder: Path, *, base_model: str | None = None, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the files that PEFT loads elsewhere. base_model: the path or hub id of the model that it is for.

        parameters: whole tensors to save in place of the adapter's own, by the names that they have in the policy's model.
        """
        ...

    def quantized(self) -> None:
        """To be called once, after the model's layers have been quantized: an adapter may read their weights."""
        ...

    def trained(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of the adapter, by their names in the policy's model."""
        ...

    def lr_factor(self, name: str) -> float:
        """The learning rate of the policy's own parameter of this name, over that of the schedule."""
        ...

    def observer(self) -> Observer | None:
        """A new one of the policy's own adapter, if that begins from its layers' inputs."""
        ...

    def using(self, name: str | None) -> AbstractContextManager[Any]:
        """A context with this adapter in use, or with None the base only. requires_grad does not change. A backward pass with
        activation checkpointing must run inside."""
        ...

    def by_documents(self, slot_M: Tensor, cu_seqlens_S: Tensor, num_tokens: int) -> Mapping[str, Any]:
        """The arguments of the layers for documents with several adapters. slot_M: adapter numbers, -1 for none."""
        ...

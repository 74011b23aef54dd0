"""The interface of adapters for the rest of the package. PEFT's classes and the methods stay in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig, SavedAdapter

OWN = "default"
"""The name of the policy's own adapter, with which it was built."""


class Observer(Protocol):
    """Observes the inputs of layers, from which a new adapter is initialized (EVA)."""

    def watching(self, tokens_N: Tensor, num_tokens: int) -> AbstractContextManager[None]:
        """A context for one forward pass of the base over num_tokens tokens. tokens_N: int64, the flat positions of the tokens to
        observe."""
        ...

    def values(self) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter of the adapter, its initial value). Parameters may be sharded; the values are full tensors."""
        ...


class Adapters(Protocol):
    """The adapters in the layers of one model, by name. At most one of them is active."""

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, including the adapters' modules in its layers."""
        ...

    @property
    def model(self) -> Any:
        """The module to call for a forward pass: the base, or PEFT's model around it."""
        ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def max_rank(self) -> int:
        """The largest rank of a layer; 0 without low-rank adapters."""
        ...

    def described(self, device_type: str) -> str | None:
        """A description, for the log, of how adapters are computed on this device; None without adapters."""
        ...

    def add(self, name: str, source: AdapterConfig | SavedAdapter) -> None:
        """Add a new adapter by its settings, or a saved one. It is frozen, and the active adapter does not change.

        Raises ConfigError for a folder without an adapter of this model, and for settings that don't fit the model.
        """
        ...

    def remove(self, name: str) -> None: ...

    def save(
        self, name: str, folder: Path, *, base_model: str | None = None, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the adapter's files, which PEFT can load. base_model: the path or hub id of its base, for the config.

        parameters: full tensors to save instead of the adapter's own, by their names in the policy's model.
        """
        ...

    def quantized(self) -> None:
        """To be called once, after the model's layers were quantized, since adapters such as DoRA read their weights."""
        ...

    def trained(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of the adapter, by their names in the policy's model."""
        ...

    def lr_factor(self, name: str) -> float:
        """The factor of the learning rate for the policy's own parameter of this name."""
        ...

    def observer(self) -> Observer | None:
        """A new observer, if the policy's own adapter is initialized from its layers' inputs; else None."""
        ...

    def using(self, name: str | None) -> AbstractContextManager[Any]:
        """A context in which this adapter is active; None: no adapter. requires_grad does not change. With activation
        checkpointing, the backward pass must run inside it too."""
        ...

    def by_documents(self, slot_M: Tensor, cu_seqlens_S: Tensor, num_tokens: int) -> Mapping[str, Any]:
        """The layers' arguments for documents with several adapters. slot_M: the slot of each document's adapter, -1 for none."""
        ...

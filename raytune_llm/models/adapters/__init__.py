"""Adapters behind one protocol. PEFT provides the layers and the file format; no code outside this folder uses its classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig, Layered, SavedAdapter
from raytune_llm.config.section import settings_of
from raytune_llm.models.adapters import peft_alone  # noqa: F401  # before those that import from PEFT
from raytune_llm.models.adapters.bank import LoraBank, Weights
from raytune_llm.models.adapters.bank_weights import UNMIXED_FIX, reads_weights, unmixed
from raytune_llm.models.adapters.freeze import freeze
from raytune_llm.models.adapters.in_peft import PeftAdapters
from raytune_llm.models.adapters.llama_pro import llama_pro
from raytune_llm.models.adapters.method import Kept
from raytune_llm.models.adapters.methods import method_of
from raytune_llm.models.adapters.protocol import OWN, Adapters
from raytune_llm.models.adapters.saved import other_base
from raytune_llm.models.quantization.base import Quantization

__all__ = [
    "OWN",
    "UNMIXED_FIX",
    "Adapters",
    "Kept",
    "LoraBank",
    "PeftAdapters",
    "Slots",
    "Weights",
    "adapt",
    "bank_of",
    "kept_by",
    "merge",
    "other_base",
    "reads_weights",
    "unmixed",
]


def train_all(model: PreTrainedModel) -> None:
    model.requires_grad_(True)


WHOLE_MODELS: dict[str, Callable[..., None]] = {"none": train_all, "freeze": freeze, "llama_pro": llama_pro}
"""Methods that train the model's own weights: name -> function that sets requires_grad."""


@dataclass(frozen=True)
class Slots:
    """The settings of a bank of new adapters that are trained together."""

    sections: tuple[AdapterConfig, ...]
    """The settings of each adapter. Ranks and scales may differ; the layers must be the same."""


def bank_of(model: PreTrainedModel, slots: Slots, compute: torch.dtype) -> LoraBank:
    """A bank with an empty slot for each adapter. compute: the dtype of the adapters' products."""
    first: Any = slots.sections[0]
    return LoraBank(
        model,
        num_slots=len(slots.sections),
        max_rank=max(section.rank for section in slots.sections),  # type: ignore[union-attr]  # config/sharing.py has LoRA only
        dtype=compute,
        targets=None if first.targets == "all-linear" else first.targets,
        last_layers=first.last_layers,
        trains=True,
    )


def kept_by(adapter: AdapterConfig) -> Kept:
    """The activations that the adapter's layers save for the backward pass."""
    return method_of(adapter).kept if isinstance(adapter, Layered) else Kept()


def merge(model: PreTrainedModel, folders: Sequence[str]) -> None:
    """Merge saved adapters into the model's weights, one after another. Raises ConfigError for an adapter of another model."""
    for path in folders:
        PeftAdapters(model).merge(SavedAdapter(path=path, setting="model.merged_adapters"))


def adapt(
    model: PreTrainedModel,
    adapter: AdapterConfig | SavedAdapter,
    *,
    scores: bool = False,
    new_ids: Sequence[int] = (),
    quantization: Quantization | None = None,
) -> PeftAdapters:
    """The model with its adapter, and requires_grad set on the trained parameters. Adapter weights are float32; new ones are
    drawn from torch's global generator.

    scores: the model has a score head, which is fully trained and saved with the adapter. new_ids: tokens whose embeddings belong
    to the adapter. quantization: the one that will be applied to the weights under the adapter.
    """
    if adapter.trains_base:
        WHOLE_MODELS[adapter.name](model, **settings_of(adapter))
        if scores:
            model.get_submodule("score").requires_grad_(True)
        return PeftAdapters(model, scores=scores)
    adapters = PeftAdapters(model, scores=scores)
    adapters.add_own(adapter, new_ids, quantization=quantization)
    return adapters

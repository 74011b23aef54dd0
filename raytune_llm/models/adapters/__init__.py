"""Adapters, behind one protocol: PEFT holds layers and file format, and nothing outside this folder knows its classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig, SavedAdapter
from raytune_llm.models.adapters.bank import LoraBank, Weights
from raytune_llm.models.adapters.in_peft import PeftAdapters
from raytune_llm.models.adapters.method import Kept
from raytune_llm.models.adapters.methods import METHODS
from raytune_llm.models.adapters.protocol import OWN, Adapters

__all__ = ["OWN", "Adapters", "Kept", "LoraBank", "PeftAdapters", "Weights", "adapt", "kept_by"]


def kept_by(adapter: AdapterConfig) -> Kept:
    """What its layers keep for the backward pass."""
    return Kept() if adapter.trains_base else METHODS[adapter.name].kept


def adapt(
    model: PreTrainedModel, adapter: AdapterConfig | SavedAdapter, *, scores: bool = False, new_ids: Sequence[int] = ()
) -> nn.Module:
    """The model with requires_grad set on what is trained. Adapter weights are in float32, new ones drawn from torch's generator.

    scores: the model has a score head, which is trained whole beside the adapter and saved with it. new_ids: tokens whose
    embeddings are the adapter's.
    """
    if adapter.trains_base:
        return model.requires_grad_(True)
    adapters = PeftAdapters(model, scores=scores)
    adapters.add_own(adapter, new_ids)
    return adapters.model

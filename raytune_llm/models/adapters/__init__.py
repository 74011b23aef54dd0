"""Adapter methods: name -> how the model gets one. PEFT holds the layers and the file format."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig
from raytune_llm.config.section import settings_of
from raytune_llm.models.adapters.full import train_everything
from raytune_llm.models.adapters.lora import add_lora

ADAPTERS: dict[str, Callable[..., nn.Module]] = {"none": train_everything, "lora": add_lora}


def adapt(model: PreTrainedModel, adapter: AdapterConfig, *, scores: bool = False) -> nn.Module:
    """The model with its trainable part marked. Adapter weights start in float32; A is drawn from torch's generator.

    scores: the model has a score head, which is trained whole beside the adapter and saved with it.
    """
    return ADAPTERS[adapter.name](model, scores=scores, **settings_of(adapter))

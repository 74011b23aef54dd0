"""LoRA with a scale of alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)."""

from __future__ import annotations

from functools import partial

from peft import LoraConfig, PeftConfig

from raytune_llm.models.adapters.lora import lora, ranks_fit
from raytune_llm.models.adapters.method import Method


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, LoraConfig) and saved.use_rslora and not saved.use_dora


RSLORA = Method(config=partial(lora, use_rslora=True), describes=describes, check=ranks_fit)

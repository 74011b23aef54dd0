"""PiSSA: LoRA is initialized as the principal components of a weight (Meng et al. 2024, arXiv 2404.02948).

W = U S V^T. B A begins as the r largest singular values with their vectors, split evenly and divided by the scale, and the frozen
weight is the remainder. It is saved as plain LoRA of rank 2 r on the original weight, [B, -B0] [A; A0], as PEFT converts it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

from raytune_llm.models.adapters.lora import lora, lr_factor, ranks_fit
from raytune_llm.models.adapters.method import Layers, Method, Tensors, only_linear


def config(*, svd_iterations: int | None, **settings: Any) -> LoraConfig:
    made = lora(**settings)
    # PEFT's name for it. `saved` resets it, since PEFT would otherwise split the weight again on loading.
    made.init_lora_weights = "pissa" if svd_iterations is None else f"pissa_niter_{svd_iterations}"  # type: ignore[assignment]
    return made


def describes(saved: PeftConfig) -> bool:
    """False: PiSSA is saved as LoRA."""
    return False


def check(layers: Layers, *, svd_iterations: int | None, **settings: Any) -> None:
    only_linear(layers, "pissa")
    ranks_fit(layers, spares_gates=False, **settings)


def saved(config: PeftConfig, tensors: Tensors, begun: Tensors) -> tuple[PeftConfig, Tensors]:
    """The equivalent LoRA: twice the rank, and an alpha that keeps the scale (alpha / rank, or alpha / sqrt(rank))."""
    assert isinstance(config, LoraConfig)
    config = copy.copy(config)
    config.init_lora_weights = True
    grown = sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, grown * config.lora_alpha  # type: ignore[assignment]  # whole or not
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: grown * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return config, {name: _joined(name, value, begun) for name, value in tensors.items()}


def _joined(name: str, value: Tensor, begun: Mapping[str, Tensor]) -> Tensor:
    if ".lora_A." in name:
        return torch.cat([value, begun[name].to(value)])
    return torch.cat([value, -begun[name].to(value)], dim=1) if ".lora_B." in name else value


PISSA = Method(config=config, describes=describes, check=check, saved=saved, lr_factor=lr_factor)

"""Optimizers: name -> how one is built over named parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from raytune_llm.config.optimizer import OptimizerConfig
from raytune_llm.config.section import settings_of
from raytune_llm.train.optimizers.adamw import adamw

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw}


def build_optimizer(
    optimizer: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    """Over the parameters that are trained."""
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    return OPTIMIZERS[optimizer.name](trained, fused=fused, **settings_of(optimizer))

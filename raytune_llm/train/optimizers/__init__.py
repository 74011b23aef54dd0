"""Optimizers: name -> how one is built over what is trained.

Strategies clip and unscale the gradient, and skip the step where it is not finite, for any torch optimizer. One that does so by
itself as it reads the gradient, like torch's fused AdamW, says it by torch's own attribute (`_step_supports_amp_scaling`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from raytune_llm.config.optimizer import OptimizerConfig
from raytune_llm.config.section import settings_of
from raytune_llm.train.optimizers.adamw import adamw
from raytune_llm.train.optimizers.groups import Trained, trained_in
from raytune_llm.train.optimizers.muon import muon
from raytune_llm.train.optimizers.sgd import sgd

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "muon": muon, "sgd": sgd}


def build_optimizer(
    optimizer: OptimizerConfig, model: nn.Module, *, fused: bool, lr_factor: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """Over the parameters of the model that are trained. fused: in one kernel, where it has one. lr_factor: of a parameter's
    name, its learning rate over that of the schedule."""
    return optimizer_of(optimizer, trained_in(model, lr_factor), fused=fused)


def optimizer_of(optimizer: OptimizerConfig, trained: Sequence[Trained], *, fused: bool) -> torch.optim.Optimizer:
    return OPTIMIZERS[optimizer.name](trained, fused=fused, **settings_of(optimizer))

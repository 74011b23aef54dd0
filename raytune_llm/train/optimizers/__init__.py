"""Optimizers: name -> a function that builds one over the trained parameters.

For any torch optimizer, strategies unscale and clip the gradient, and skip the step if it is not finite. An optimizer that can do
this while it reads the gradient, like torch's fused AdamW, has torch's attribute `_step_supports_amp_scaling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from raytune_llm.config.optimizer import OptimizerConfig
from raytune_llm.config.section import settings_of
from raytune_llm.train.optimizers.adafactor import adafactor
from raytune_llm.train.optimizers.adam_mini import adam_mini
from raytune_llm.train.optimizers.adamw import adamw
from raytune_llm.train.optimizers.adamw_8bit import adamw_8bit
from raytune_llm.train.optimizers.adamw_bf16 import adamw_bf16
from raytune_llm.train.optimizers.apollo import apollo
from raytune_llm.train.optimizers.badam import badam
from raytune_llm.train.optimizers.galore import galore
from raytune_llm.train.optimizers.groups import Group, Trained, trained_in, with_groups
from raytune_llm.train.optimizers.lion import lion
from raytune_llm.train.optimizers.muon import muon
from raytune_llm.train.optimizers.schedule_free import schedule_free
from raytune_llm.train.optimizers.sgd import sgd

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adafactor": adafactor,
    "adam_mini": adam_mini,
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "adamw_bf16": adamw_bf16,
    "apollo": apollo,
    "badam": badam,
    "galore": galore,
    "lion": lion,
    "muon": muon,
    "schedule_free": schedule_free,
    "sgd": sgd,
}


def build_optimizer(
    optimizer: OptimizerConfig, model: nn.Module, *, fused: bool, lr_factor: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """The optimizer over the model's trained parameters. fused: use a fused kernel if there is one. lr_factor: a parameter's name
    -> its learning rate as a multiple of the schedule's."""
    return optimizer_of(optimizer, trained_in(model, lr_factor), fused=fused)


def optimizer_of(optimizer: OptimizerConfig, trained: Sequence[Trained], *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer over these parameters. The config's groups multiply their learning-rate factors."""
    settings = {name: value for name, value in settings_of(optimizer).items() if name != "layerwise"}
    groups = {pattern: Group(group.lr_factor, group.weight_decay) for pattern, group in settings.pop("groups").items()}
    return OPTIMIZERS[optimizer.name](with_groups(trained, groups), fused=fused, **settings)

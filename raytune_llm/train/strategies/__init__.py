"""Strategies spread a model over workers: name -> strategy. The loop does not know which one runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raytune_llm.config.section import settings_of
from raytune_llm.config.strategy import StrategyConfig
from raytune_llm.models.policy import Policy
from raytune_llm.train.strategies.base import Strategy, Training

BuildOptimizer = Callable[..., torch.optim.Optimizer]


def _ddp(*args, **settings) -> Strategy:
    from raytune_llm.train.strategies.ddp import DDPStrategy

    return DDPStrategy(*args, **settings)


def _fsdp(*args, **settings) -> Strategy:
    from raytune_llm.train.strategies.fsdp import FSDPStrategy

    return FSDPStrategy(*args, **settings)


def _deepspeed(*args, **settings) -> Strategy:
    from raytune_llm.train.strategies.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(*args, **settings)


STRATEGIES: dict[str, Callable[..., Strategy]] = {"ddp": _ddp, "fsdp": _fsdp, "deepspeed": _deepspeed}
"""The imports stay inside: DeepSpeed is an optional package, and slow to import."""
READS_FILES = {"ddp": False, "fsdp": True, "deepspeed": True}
"""Whether the strategy itself reads weights from files, if they can be read part by part."""
FIRST_LOADS = {"ddp": False, "fsdp": True, "deepspeed": False}
"""Whether otherwise only rank 0 loads the weights and sends the others their shards."""


def spread(strategy: StrategyConfig, model: Policy, build_optimizer: BuildOptimizer, training: Training) -> Strategy:
    """Build the strategy around a model."""
    return STRATEGIES[strategy.name](model, build_optimizer, training, **settings_of(strategy))

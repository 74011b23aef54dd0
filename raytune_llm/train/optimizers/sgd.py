from __future__ import annotations

from collections.abc import Sequence

import torch

from raytune_llm.train.optimizers.groups import Trained, by_decay


def sgd(
    trained: Sequence[Trained], *, lr: float, momentum: float, nesterov: bool, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """Gradient descent with momentum. Never fused: where torch's fused one skips its first step, its momentum stays as the memory
    was found."""
    return torch.optim.SGD(by_decay(trained, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov)

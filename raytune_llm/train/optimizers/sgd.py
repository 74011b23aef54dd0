from __future__ import annotations

from collections.abc import Sequence

import torch

from raytune_llm.train.optimizers.groups import Trained, by_decay


def sgd(
    trained: Sequence[Trained], *, lr: float, momentum: float, nesterov: bool, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """Gradient descent with momentum. It is never fused: if torch's fused SGD skips its first step, its momentum is uninitialized
    memory."""
    return torch.optim.SGD(by_decay(trained, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov)

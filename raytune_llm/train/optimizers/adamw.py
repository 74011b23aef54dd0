from __future__ import annotations

from collections.abc import Sequence

import torch

from raytune_llm.train.optimizers.groups import Trained, by_decay


def adamw(
    trained: Sequence[Trained], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017), in one kernel where `fused`."""
    return torch.optim.AdamW(by_decay(trained, weight_decay), lr=lr, betas=(beta1, beta2), eps=eps, fused=fused)

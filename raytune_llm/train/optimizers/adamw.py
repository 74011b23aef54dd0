from __future__ import annotations

import torch
from torch import nn


def adamw(
    named_parameters: list[tuple[str, nn.Parameter]],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    fused: bool,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017), in one kernel where `fused`. Vectors (norms, biases) are not decayed."""
    matrices = [parameter for _, parameter in named_parameters if parameter.ndim >= 2]
    vectors = [parameter for _, parameter in named_parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(beta1, beta2), eps=eps, fused=fused)

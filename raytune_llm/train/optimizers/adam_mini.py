from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from raytune_llm.train.optimizers.by_tensor import COUNT, ByTensor, Layout, State, counted, decay
from raytune_llm.train.optimizers.groups import Trained, by_decay


def adam_mini(
    trained: Sequence[Trained], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    groups = []
    for rows, same in groupby(sorted(trained, key=lambda one: one.rows_per_head), key=lambda one: one.rows_per_head):
        groups += by_decay(list(same), weight_decay, rows=rows)
    return AdamMini(groups, {"lr": lr, "betas": (beta1, beta2), "eps": eps})


class AdamMini(ByTensor):
    """AdamW with one second moment per block: the mean of its squared gradients (Zhang et al. 2024, algorithms 1 and 3).

    A block is a head of queries or keys, a row of another matrix (a neuron or a token; of each expert in a fused tensor), or a
    vector.
    """

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        blocks = () if len(shape) < 2 else (shape[0] // group["rows"], *shape[1:-1])
        return {"step": COUNT, "exp_avg": (shape, dtype), "block_sq": (blocks or (1,), dtype)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        beta1, beta2 = group["betas"]
        count = counted(state)
        blocks = state["block_sq"]
        apart = (1, -1) if weight.ndim < 2 else (*blocks.shape, -1)
        second = blocks.lerp_(gradient.square().view(apart).mean(dim=-1), 1 - beta2)
        denominator = (second.sqrt() / sqrt(1 - beta2**count)).add_(group["eps"]).unsqueeze(-1)
        decay(weight, group)
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        step = first.reshape(apart) / denominator
        weight.sub_(step.view(weight.shape), alpha=group["lr"] / (1 - beta1**count))

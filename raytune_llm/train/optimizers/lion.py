from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raytune_llm.train.optimizers.by_tensor import ByTensor, Layout, State, decay
from raytune_llm.train.optimizers.groups import Trained, by_decay


def lion(
    trained: Sequence[Trained], *, lr: float, beta1: float, beta2: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    return Lion(by_decay(trained, weight_decay), {"lr": lr, "betas": (beta1, beta2)})


class Lion(ByTensor):
    """w -= lr sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g (Chen et al. 2023, algorithm 2)."""

    by_matrix = False

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        return {"exp_avg": (shape, dtype)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        beta1, beta2 = group["betas"]
        decay(weight, group)
        momentum = state["exp_avg"]
        weight.sub_(momentum.lerp(gradient, 1 - beta1).sign_(), alpha=group["lr"])
        momentum.lerp_(gradient, 1 - beta2)

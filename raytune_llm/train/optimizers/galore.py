from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raytune_llm.train.optimizers.by_tensor import Layout, State
from raytune_llm.train.optimizers.groups import Trained
from raytune_llm.train.optimizers.low_rank import (
    LowRank,
    adam_direction,
    is_tall,
    low_rank,
    low_rank_groups,
    project,
    project_back,
)


def galore(
    trained: Sequence[Trained],
    *,
    lr: float,
    rank: int,
    update_every: int,
    scale: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    fused: bool,
) -> torch.optim.Optimizer:
    groups = low_rank_groups(trained, weight_decay, rank=rank, update_every=update_every, scale=scale)
    return GaLore(groups, {"lr": lr, "betas": (beta1, beta2), "eps": eps})


class GaLore(LowRank):
    """Zhao et al. 2024, algorithm 2: Adam on the gradient's projection to its largest singular vectors, projected back."""

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        layout = super().layout(shape, dtype, group)
        if group["rank"] is not None:
            layout["basis"] = ((*shape[:-2], min(shape[-2:]), low_rank(shape, group["rank"])), dtype)
        return layout

    def projected_step(self, gradient: Tensor, state: State, group: dict[str, Any], count: int, number: int) -> Tensor:
        basis = state["basis"]
        if (count - 1) % group["update_every"] == 0:
            basis.copy_(largest_directions(gradient, group["rank"]))
        low = adam_direction(project(gradient, basis), state, group)
        return project_back(low, basis, gradient.shape).mul_(group["scale"])


def largest_directions(gradient: Tensor, rank: int) -> Tensor:
    """[..., shorter side, rank]: the largest singular vectors of each matrix, on its shorter side."""
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return right[..., :rank, :].mT if is_tall(gradient.shape) else left[..., :rank]

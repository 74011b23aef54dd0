"""What GaLore and APOLLO share: Adam's moments of a matrix's gradient in fewer dimensions, and AdamW for what is not projected.

The shorter side is projected: a gradient of 576 x 1536 with rank 64 has moments of 64 x 1536. Experts in one tensor [E, N, K] are
matrices of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from raytune_llm.train.optimizers.by_tensor import COUNT, ByTensor, Layout, State, counted, decay
from raytune_llm.train.optimizers.groups import Groups, Trained, by_decay


def low_rank_groups(trained: Sequence[Trained], weight_decay: float, *, rank: int, **settings: Any) -> Groups:
    """Matrices of layers are projected, the rest is not (rank None)."""
    return [
        *by_decay([one for one in trained if one.is_layer_matrix], weight_decay, rank=rank, **settings),
        *by_decay([one for one in trained if not one.is_layer_matrix], weight_decay, rank=None),
    ]


class LowRank(ByTensor):
    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        moments = shape if group["rank"] is None else low_shape(shape, group["rank"])
        return {"step": COUNT, "exp_avg": (moments, dtype), "exp_avg_sq": (moments, dtype)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        count = counted(state)
        decay(weight, group)
        if group["rank"] is None:
            step = adam_direction(gradient, state, group)
        else:
            step = self.projected_step(gradient, state, group, count, number)
        weight.sub_(step, alpha=group["lr"] * correction(group, count))

    def projected_step(self, gradient: Tensor, state: State, group: dict[str, Any], count: int, number: int) -> Tensor:
        """The step of a matrix before the learning rate and the correction of bias. count: of steps, from 1."""
        raise NotImplementedError


def low_rank(shape: tuple[int, ...], rank: int) -> int:
    """A shorter side that is no longer than the rank keeps its length. Its steps are still those of a projected gradient, with
    their scale: a rate fits all matrices."""
    return min(rank, *shape[-2:])


def low_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    *experts, rows, columns = shape
    low = low_rank(shape, rank)
    return (*experts, rows, low) if rows >= columns else (*experts, low, columns)


def is_tall(shape: Sequence[int]) -> bool:
    """It has at least as many rows as columns, which are the side that is projected then."""
    return shape[-2] >= shape[-1]


def project(gradient: Tensor, basis_SR: Tensor) -> Tensor:
    """S: the shorter side."""
    return gradient @ basis_SR if is_tall(gradient.shape) else basis_SR.mT @ gradient


def project_back(low: Tensor, basis_SR: Tensor, shape: torch.Size) -> Tensor:
    return low @ basis_SR.mT if is_tall(shape) else basis_SR @ low


def adam_direction(gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Kingma & Ba 2014 before the correction of its bias; eps is beside the uncorrected second moment, as both methods were
    published."""
    beta1, beta2 = group["betas"]
    first = state["exp_avg"].lerp_(gradient, 1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return first / second.sqrt().add_(group["eps"])


def correction(group: dict[str, Any], count: int) -> float:
    """The factor that corrects the bias of both moments."""
    beta1, beta2 = group["betas"]
    return sqrt(1 - beta2**count) / (1 - beta1**count)

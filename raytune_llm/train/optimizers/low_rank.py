"""The common part of GaLore and APOLLO: Adam's moments of a low-rank projection of the gradient, and AdamW for other parameters.

The shorter side is projected: a gradient of 576 x 1536 with rank 64 has moments of 64 x 1536. Each expert in a tensor [E, N, K]
is a matrix of its own.
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
    """Parameter groups: matrices in layers have the rank, all others rank None, which means plain AdamW."""
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
        """The step of a matrix, before learning rate and bias correction. count: the number of this step, from 1."""
        raise NotImplementedError


def low_rank(shape: tuple[int, ...], rank: int) -> int:
    """The rank for a matrix: at most the length of its shorter side. Small matrices are projected too, so that all steps have the
    same scale and one learning rate fits."""
    return min(rank, *shape[-2:])


def low_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    *experts, rows, columns = shape
    low = low_rank(shape, rank)
    return (*experts, rows, low) if rows >= columns else (*experts, low, columns)


def is_tall(shape: Sequence[int]) -> bool:
    """Whether it has at least as many rows as columns, so that columns are the side to project."""
    return shape[-2] >= shape[-1]


def project(gradient: Tensor, basis_SR: Tensor) -> Tensor:
    """The gradient with its shorter side S projected to the rank R."""
    return gradient @ basis_SR if is_tall(gradient.shape) else basis_SR.mT @ gradient


def project_back(low: Tensor, basis_SR: Tensor, shape: torch.Size) -> Tensor:
    return low @ basis_SR.mT if is_tall(shape) else basis_SR @ low


def adam_direction(gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Adam's direction without bias correction (Kingma & Ba 2014). eps is added to the root of the uncorrected second moment, as
    in the code that GaLore's and APOLLO's authors published."""
    beta1, beta2 = group["betas"]
    first = state["exp_avg"].lerp_(gradient, 1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return first / second.sqrt().add_(group["eps"])


def correction(group: dict[str, Any], count: int) -> float:
    """The factor that corrects the bias of both moments."""
    beta1, beta2 = group["betas"]
    return sqrt(1 - beta2**count) / (1 - beta1**count)

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from raytune_llm.train.optimizers.by_tensor import Layout, State
from raytune_llm.train.optimizers.groups import Trained
from raytune_llm.train.optimizers.low_rank import LowRank, adam_direction, is_tall, low_rank, low_rank_groups, project

GROWTH = 1.01
"""Maximum ratio of a step's norm to that of the last one (Chen et al. 2024, arXiv 2410.01623)."""
TINY = 1e-8
SEEDS_APART = 1_000_003


def apollo(
    trained: Sequence[Trained],
    *,
    lr: float,
    rank: int,
    sizes: str,
    update_every: int,
    scale: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    fused: bool,
) -> torch.optim.Optimizer:
    groups = low_rank_groups(trained, weight_decay, rank=rank, update_every=update_every, scale=scale, sizes=sizes)
    return Apollo(groups, {"lr": lr, "betas": (beta1, beta2), "eps": eps})


class Apollo(LowRank):
    """Zhu et al. 2024, algorithm 1: the gradient is scaled by the ratio by which Adam changes the norm of its random projection,
    per row or column, or for the whole matrix.

    The projection is not stored, but drawn again in each step from a seed, which changes every `update_every` steps.
    """

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        layout = super().layout(shape, dtype, group)
        if group["rank"] is not None:
            layout["last_norm"] = (shape[:-2] or (1,), dtype)
        return layout

    def projected_step(self, gradient: Tensor, state: State, group: dict[str, Any], count: int, number: int) -> Tensor:
        seed = number * SEEDS_APART + (count - 1) // group["update_every"]
        low = project(gradient, self.projection(gradient, low_rank(gradient.shape, group["rank"]), seed))
        step = gradient * lengthening(adam_direction(low, state, group), low, group["sizes"])
        return limited(step, state["last_norm"]).mul_(sqrt(group["scale"]))

    def projection(self, gradient: Tensor, rank: int, seed: int) -> Tensor:
        """[shorter side, rank]: normal random numbers with variance 1 / rank."""
        generator = torch.Generator(gradient.device).manual_seed(seed)
        sizes = (*gradient.shape[:-2], min(gradient.shape[-2:]), rank)
        drawn = torch.randn(sizes, generator=generator, dtype=gradient.dtype, device=gradient.device)
        return drawn / sqrt(rank)


def lengthening(stepped: Tensor, low: Tensor, sizes: str) -> Tensor:
    """The norm of Adam's step divided by that of the gradient. low, stepped: the projected gradient before and after Adam. sizes:
    one ratio per matrix, or per channel."""
    along: Any = {"tensor": (-2, -1), "channel": -1 if is_tall(low.shape) else -2}[sizes]
    return stepped.norm(dim=along, keepdim=True) / (low.norm(dim=along, keepdim=True) + TINY)


def limited(step: Tensor, last_norm: Tensor) -> Tensor:
    """The step, scaled down if its norm grew by more than GROWTH. last_norm: the norm of each matrix's last step that was not
    zero (an expert without tokens has zero steps); 0: there was none yet."""
    norm = step.norm(dim=(-2, -1), keepdim=True)
    last = last_norm.view_as(norm)
    allowed = torch.where(last > 0, torch.minimum(norm, (last + TINY) * GROWTH), norm)
    last_norm.copy_(torch.where(norm > 0, allowed, last).flatten())
    return step * (allowed / (norm + torch.finfo(step.dtype).tiny))

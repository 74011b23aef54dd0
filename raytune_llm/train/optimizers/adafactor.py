from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raytune_llm.train.optimizers.by_tensor import COUNT, ByTensor, Layout, State, counted, decay
from raytune_llm.train.optimizers.groups import Trained, by_decay

LEAST_SCALE = 1e-3
"""The smallest scale of steps relative to weights (epsilon_2 in the paper)."""


def adafactor(
    trained: Sequence[Trained],
    *,
    lr: float,
    beta2_decay: float,
    eps: float,
    clip_threshold: float,
    relative_to_weights: bool,
    weight_decay: float,
    fused: bool,
) -> torch.optim.Optimizer:
    settings = {
        "lr": lr,
        "beta2_decay": beta2_decay,
        "eps": eps,
        "clip_threshold": clip_threshold,
        "relative_to_weights": relative_to_weights,
    }
    return Adafactor(by_decay(trained, weight_decay), settings)


class Adafactor(ByTensor):
    """Shazeer & Stern 2018, algorithms 4 and 5: the second moments of a matrix are approximated by the outer product of their row
    and column means, divided by the mean of all. A step with a root mean square above the threshold is scaled down to it.

    torch.optim.Adafactor is always relative to the weights and lowers the learning rate with the step number, so it is not used.
    """

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        if len(shape) < 2:
            return {"step": COUNT, "exp_avg_sq": (shape, dtype)}
        return {"step": COUNT, "row_mean": (shape[:-1], dtype), "column_mean": (shape[:-2] + shape[-1:], dtype)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        kept = 1 - counted(state) ** -group["beta2_decay"]
        square = gradient.square().add_(group["eps"])
        if weight.ndim < 2:
            step = gradient * state["exp_avg_sq"].lerp_(square, 1 - kept).rsqrt()
        else:
            rows = state["row_mean"].lerp_(square.mean(dim=-1), 1 - kept)
            columns = state["column_mean"].lerp_(square.mean(dim=-2), 1 - kept)
            by_row = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            step = gradient * by_row * columns.unsqueeze(-2).rsqrt()
        step /= (rms(step) / group["clip_threshold"]).clamp(min=1.0)
        scale = rms(weight).clamp(min=LEAST_SCALE) if group["relative_to_weights"] else 1.0
        decay(weight, group)
        weight.sub_(step * scale, alpha=group["lr"])


def rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt()

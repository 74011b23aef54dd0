from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raytune_llm.train.optimizers.by_tensor import COUNT, ByTensor, Layout, State, counted
from raytune_llm.train.optimizers.groups import Trained, by_decay

RATE_POWER = 2
"""The average weighs a step by the square of the highest learning rate so far, so that warm-up steps count little."""
FAST = "fast"


def schedule_free(
    trained: Sequence[Trained], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    return ScheduleFree(by_decay(trained, weight_decay), {"lr": lr, "betas": (beta1, beta2), "eps": eps})


class ScheduleFree(ByTensor):
    """Defazio et al. 2024, algorithm 1, with AdamW's denominator. z are the iterates, x is their average, and the gradient is
    taken at y between them. The parameter holds y and the state holds z; x is computed from both."""

    by_matrix = False

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        counts = {"step": COUNT, "highest_lr": COUNT, "shares": COUNT}
        return {**counts, FAST: (shape, dtype), "exp_avg_sq": (shape, dtype)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        beta1, beta2 = group["betas"]
        lr, fast = group["lr"], state[FAST]
        count = counted(state)
        if count == 1:
            fast.copy_(weight)
        share = _share(state, lr)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = gradient / (second / (1 - beta2**count)).sqrt_().add_(group["eps"])
        step.add_(weight, alpha=group["weight_decay"])
        weight.lerp_(fast, share).add_(step, alpha=lr * (beta1 * (1 - share) - 1))
        fast.sub_(step, alpha=lr)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context, parameters hold x. y is kept and restored: computed from x again, it would differ in the last
        bit."""
        between: dict[Tensor, Tensor] = {}
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if FAST in self.state[parameter]:
                        between[parameter] = parameter.detach().clone()
                        parameter.copy_(average(parameter, self.state[parameter][FAST], group["betas"][0]))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, kept in between.items():
                    parameter.copy_(kept)


def _share(state: State, lr: float) -> float:
    """The weight of this step in the average, from 0 to 1."""
    state["highest_lr"].clamp_(min=lr)
    this = state["highest_lr"].item() ** RATE_POWER
    state["shares"] += this
    return this / state["shares"].item() if this else 0.0


def average(weight: Tensor, fast: Tensor, beta1: float) -> Tensor:
    """x, where y = beta1 x + (1 - beta1) z."""
    return weight.lerp(fast, 1 - 1 / beta1)

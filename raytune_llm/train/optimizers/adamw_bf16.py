from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from raytune_llm.train.optimizers.by_tensor import COUNT, ByTensor, Layout, State, counted, decay
from raytune_llm.train.optimizers.groups import Trained, by_decay

SEEDS_APART = 1_000_003
LOW_BITS = 1 << 16
"""The values of the 16 bits that float32 has below bf16's last bit."""


def adamw_bf16(
    trained: Sequence[Trained], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    return AdamWBF16(by_decay(trained, weight_decay), {"lr": lr, "betas": (beta1, beta2), "eps": eps})


class AdamWBF16(ByTensor):
    """AdamW whose moments are stochastically rounded to bf16. With rounding to nearest, a second moment would never change: with
    beta2 = 0.999, a step changes it by less than half of the last bit.

    The random numbers depend only on the tensor, the step and the shard, so a resumed run draws the same ones.
    """

    by_matrix = False

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        return {"step": COUNT, "exp_avg": (shape, torch.bfloat16), "exp_avg_sq": (shape, torch.bfloat16)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        beta1, beta2 = group["betas"]
        count = counted(state)
        generator = torch.Generator(weight.device).manual_seed(number * SEEDS_APART + count)
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        decay(weight, group)
        denominator = (second.sqrt() / sqrt(1 - beta2**count)).add_(group["eps"])
        weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**count))
        state["exp_avg"].copy_(rounded_by_chance(first, generator))
        state["exp_avg_sq"].copy_(rounded_by_chance(second, generator))


def rounded_by_chance(value: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 with the last 16 bits 0, rounded up with the probability that these bits stand for: a random number is added to
    them, and they are cut off."""
    drawn = torch.randint(0, LOW_BITS, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    return drawn.add_(value.contiguous().view(torch.int32)).bitwise_and_(-LOW_BITS).view(torch.float32)

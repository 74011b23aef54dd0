from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytune_llm.train.optimizers.adamw import adamw
from raytune_llm.train.optimizers.adamw_bf16 import adamw_bf16
from raytune_llm.train.optimizers.by_tensor import ByTensor, Layout, State, decay, gathered, scatter
from raytune_llm.train.optimizers.groups import Trained, by_decay

LIKE_ADAMW = "match_rms_adamw"
"""torch's name for scaling steps to the size of AdamW's: lr * 0.2 * sqrt(longer side)."""
RMS_OF_ADAMW = 0.2
COEFFICIENTS, ITERATIONS, TINY = (3.4445, -4.7750, 2.0315), 5, 1e-7
"""Constants of the Newton-Schulz iteration; torch has the same defaults."""
MOMENTUM = "momentum_buffer"
ADAMW = {"float32": adamw, "bfloat16": adamw_bf16}
"""adamw_moments -> the AdamW for parameters that Muon does not train."""


def muon(
    trained: Sequence[Trained],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    adamw_lr_factor: float,
    adamw_moments: str,
    fused: bool,
) -> torch.optim.Optimizer:
    """Muon for matrices in layers, and AdamW for all other parameters. torch's own Muon is used for single matrices."""
    matrices = [one for one in trained if one.is_layer_matrix and one.parameter.ndim == 2]
    experts = [one for one in trained if one.is_layer_matrix and one.parameter.ndim == 3]
    others = [replace(one, lr_factor=one.lr_factor * adamw_lr_factor) for one in trained if not one.is_layer_matrix]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(Muon(by_decay(matrices, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov, adjust_lr_fn=LIKE_ADAMW))
    if experts:
        parts.append(ExpertsMuon(by_decay(experts, weight_decay), {"lr": lr, "momentum": momentum, "nesterov": nesterov}))
    if others:
        rest = ADAMW[adamw_moments]
        parts.append(rest(others, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, fused=fused))
    return Joined(parts)


class Muon(torch.optim.Muon):
    """torch.optim.Muon that supports sharded matrices. Over shards, torch's bf16 products would be summed in an order that
    depends on the number of workers. So each sharded matrix is gathered for its step, one at a time, and every worker computes
    it; the momentum stays sharded."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        parameters = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        if not any(isinstance(parameter, DTensor) for parameter, _ in parameters):
            super().step(closure)
            return
        for parameter, group in parameters:
            if parameter.grad is not None:
                self._step_gathered(parameter, group)

    def _step_gathered(self, parameter: Any, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter.grad)
        whole = nn.Parameter(gathered(parameter))
        whole.grad = gathered(parameter.grad)
        alone = torch.optim.Muon([{**group, "params": [whole]}])
        alone.state[whole][MOMENTUM] = momentum = gathered(state[MOMENTUM])
        alone.step()
        scatter(whole.detach(), parameter)
        scatter(momentum, state[MOMENTUM])


class ExpertsMuon(ByTensor):
    """Muon for experts in one tensor [E, N, K]: each expert is a matrix, and all are computed at once."""

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        return {MOMENTUM: (shape, dtype)}

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        momentum = state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        decay(weight, group)
        size = RMS_OF_ADAMW * sqrt(max(weight.shape[-2:]))
        weight.add_(orthogonalized(direction), alpha=-group["lr"] * size)


def orthogonalized(matrices: Tensor) -> Tensor:
    """[..., N, K] -> [..., N, K] in bf16: each matrix with its singular values replaced by values near 1, by the Newton-Schulz
    iteration of torch.optim.Muon."""
    slope, cubic, quintic = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=slope)
    return x.mT if tall else x


class Joined(torch.optim.Optimizer):
    """Several optimizers over different parameters as one, with one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for part in self.parts:
            part.step(closure)

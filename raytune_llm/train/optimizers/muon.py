from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raytune_llm.train.optimizers.adamw import adamw
from raytune_llm.train.optimizers.adamw_bf16 import adamw_bf16
from raytune_llm.train.optimizers.by_tensor import gathered, scatter
from raytune_llm.train.optimizers.groups import Trained, by_decay

LIKE_ADAMW = "match_rms_adamw"
"""Steps of the size of AdamW's: lr * 0.2 * sqrt(the longer side)."""
MOMENTUM = "momentum_buffer"
ADAMW = {"float32": adamw, "bfloat16": adamw_bf16}
"""For what has no momentum, by the type of its moments."""


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
    """torch's Muon for matrices of the layers, AdamW for what else is trained."""
    matrices = [one for one in trained if one.is_layer_matrix]
    others = [replace(one, lr_factor=one.lr_factor * adamw_lr_factor) for one in trained if not one.is_layer_matrix]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(Muon(by_decay(matrices, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov, adjust_lr_fn=LIKE_ADAMW))
    if others:
        rest = ADAMW[adamw_moments]
        parts.append(rest(others, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, fused=fused))
    return Joined(parts)


class Muon(torch.optim.Muon):
    """torch's, of sharded matrices too. Over shards, its products would add up in bf16 in an order that follows from how many
    workers there are. So each sharded matrix is gathered for its step, one at a time, and every worker computes it; the momentum
    stays sharded."""

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


class Joined(torch.optim.Optimizer):
    """Optimizers of different parameters as one, with one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for part in self.parts:
            part.step(closure)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from raytune_llm.train.optimizers.adamw import adamw
from raytune_llm.train.optimizers.groups import Trained, by_factor

LIKE_ADAMW = "match_rms_adamw"
"""Steps of the size of AdamW's: lr * 0.2 * sqrt(the longer side)."""
MOMENTUM = "momentum_buffer"


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
    fused: bool,
) -> torch.optim.Optimizer:
    """torch's Muon for matrices of the layers, AdamW for what else is trained."""
    matrices = [one for one in trained if one.in_layer and one.parameter.ndim == 2]
    others = [one for one in trained if not (one.in_layer and one.parameter.ndim == 2)]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            Muon(
                by_factor(matrices),
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                adjust_lr_fn=LIKE_ADAMW,
            )
        )
    if others:
        rest = adamw(others, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, fused=fused)
        for group in rest.param_groups:
            group["lr_factor"] *= adamw_lr_factor
        parts.append(rest)
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
        whole = nn.Parameter(_gathered(parameter))
        whole.grad = _gathered(parameter.grad)
        alone = torch.optim.Muon([{**group, "params": [whole]}])
        alone.state[whole][MOMENTUM] = momentum = _gathered(state[MOMENTUM])
        alone.step()
        _scatter(whole.detach(), parameter)
        _scatter(momentum, state[MOMENTUM])


def _gathered(sharded: DTensor) -> Tensor:
    """On the workers' device, also where shards wait in host memory."""
    return sharded.full_tensor().to(sharded.device_mesh.device_type)


def _scatter(whole: Tensor, sharded: DTensor) -> None:
    """Every worker has the whole, and keeps its shard."""
    mesh = sharded.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded.to_local().copy_(everywhere.redistribute(placements=sharded.placements).to_local())


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

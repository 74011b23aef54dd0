"""Optimizers that are written here: each says what state a tensor has and how one step goes, the rest is common.

Published packages keep some of their state outside of tensors (projections as objects, counts as Python numbers), which no
checkpoint would hold, and know nothing of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name of a state tensor -> shape and type. All begin as zeros."""
State = dict[str, Tensor]
COUNT: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)
"""A number of steps; it is kept in host memory, where reading it waits for nothing."""


class ByTensor(torch.optim.Optimizer):
    by_matrix = True
    """A step needs all of a tensor. Then each sharded tensor is gathered for its step, one at a time, and every worker computes
    it. State of the tensor's shape stays sharded, other state is whole on every worker."""

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        raise NotImplementedError

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        """Step in place. number: of the tensor among all, for what is drawn at random."""
        raise NotImplementedError

    def zeros(self, parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As state of the parameter is kept, in a new run and in a resumed one: sharded like it where it has its shape."""
        if shape == tuple(parameter.shape):
            return torch.zeros_like(parameter, dtype=dtype)
        return torch.zeros(shape, dtype=dtype, device=parameter.device if shape else "cpu")

    def in_turn(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those that the next step changes."""
        return list(parameters)

    def averaged(self) -> AbstractContextManager[None]:
        """Around evaluation: parameters are those that are evaluated and saved."""
        return nullcontext()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group, number)
                number += 1

    def _step_one(self, parameter: Any, group: dict[str, Any], number: int) -> None:
        state: Any = self.state[parameter]
        for name, (shape, dtype) in self.layout(tuple(parameter.shape), parameter.dtype, group).items():
            if name not in state:
                state[name] = self.zeros(parameter, shape, dtype)
            elif not shape and not state[name].is_cpu:
                state[name] = state[name].cpu()
        gradient = parameter.grad
        if not isinstance(parameter, DTensor):
            self.update(parameter, gradient, state, group, number)
        elif not self.by_matrix:
            local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.items()}
            self.update(parameter.to_local(), gradient.to_local(), local, group, number)
        else:
            weight = gathered(parameter)
            whole = {name: value if value.ndim == 0 else gathered(value, weight.device) for name, value in state.items()}
            self.update(weight, gathered(gradient), whole, group, number)
            scatter(weight, parameter)
            for name, value in whole.items():
                scatter(value, state[name])


def counted(state: State) -> int:
    """The number of this step, from 1."""
    state["step"] += 1
    return int(state["step"].item())


def decay(weight: Tensor, group: dict[str, Any]) -> None:
    """Decoupled from the step (Loshchilov & Hutter 2017)."""
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])


def adamw_step(weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], count: int) -> None:
    """Loshchilov & Hutter 2017, with moments of the weight's shape in the state."""
    beta1, beta2 = group["betas"]
    decay(weight, group)
    first = state["exp_avg"].lerp_(gradient, 1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (second.sqrt() / sqrt(1 - beta2**count)).add_(group["eps"])
    weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**count))


def gathered(value: Any, device: torch.device | None = None) -> Tensor:
    """On the workers' device, also where shards wait in host memory."""
    if isinstance(value, DTensor):
        return value.full_tensor().to(value.device_mesh.device_type)
    return value.to(device)


def scatter(whole: Tensor, kept: Any) -> None:
    """Every worker has the whole; it keeps its shard, or all."""
    if not isinstance(kept, DTensor):
        kept.copy_(whole)
        return
    mesh = kept.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    kept.to_local().copy_(everywhere.redistribute(placements=kept.placements).to_local())

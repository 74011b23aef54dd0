"""The base class of optimizers that are written here. Each defines the state of a tensor and how to update it.

Published packages keep some state outside tensors (projections as objects, counts as Python numbers), which checkpoints would not
hold, and they don't support shards.
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
"""Name of a state tensor -> shape and type. All are initialized with zeros."""
State = dict[str, Tensor]
COUNT: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)
"""The layout of a step counter. It is in host memory, so that reading it does not wait for the device."""


class ByTensor(torch.optim.Optimizer):
    by_matrix = True
    """An update needs the whole tensor. Sharded tensors are then gathered one at a time, and every worker computes the update.
    State of the tensor's shape stays sharded; other state is complete on every worker."""

    def __init__(self, groups: Any, defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        every = (parameter for group in self.param_groups for parameter in group["params"])
        self._numbers: dict[Tensor, int] = {parameter: number for number, parameter in enumerate(every)}

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        raise NotImplementedError

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        """Update the weight in place. number: the tensor's number among all, to seed random numbers with."""
        raise NotImplementedError

    def zeros(self, parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """New state for a parameter: sharded like the parameter if it has the same shape."""
        if shape == tuple(parameter.shape):
            return torch.zeros_like(parameter, dtype=dtype)
        return torch.zeros(shape, dtype=dtype, device=parameter.device if shape else "cpu")

    def in_turn(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that the next step changes."""
        return list(parameters)

    def averaged(self) -> AbstractContextManager[None]:
        """A context for evaluating and saving, in which the parameters have the values to evaluate and save."""
        return nullcontext()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                number = self._numbers.setdefault(parameter, len(self._numbers))  # a strategy may have put its own there
                if parameter.grad is not None:
                    self._step_one(parameter, group, number)

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
    """Increase the step counter in the state and return it: 1 at the first step."""
    state["step"] += 1
    return int(state["step"].item())


def decay(weight: Tensor, group: dict[str, Any]) -> None:
    """Apply decoupled weight decay (Loshchilov & Hutter 2017)."""
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])


def adamw_step(weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], count: int) -> None:
    """One step of AdamW (Loshchilov & Hutter 2017), with moments of the weight's shape in the state."""
    beta1, beta2 = group["betas"]
    decay(weight, group)
    first = state["exp_avg"].lerp_(gradient, 1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (second.sqrt() / sqrt(1 - beta2**count)).add_(group["eps"])
    weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**count))


def gathered(value: Any, device: torch.device | None = None) -> Tensor:
    """The whole tensor, on the workers' device even if its shards are in host memory."""
    if isinstance(value, DTensor):
        return value.full_tensor().to(value.device_mesh.device_type)
    return value.to(device)


def scatter(whole: Tensor, kept: Any) -> None:
    """Copy the whole tensor, which every worker has, to `kept`: this worker's shard of it, or all of it."""
    if not isinstance(kept, DTensor):
        kept.copy_(whole)
        return
    mesh = kept.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    kept.to_local().copy_(everywhere.redistribute(placements=kept.placements).to_local())

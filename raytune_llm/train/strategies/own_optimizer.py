"""Strategies that keep torch's own optimizer: their backward pass, step and state, whether gradients are whole or sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytune_llm.models.policy import Policy
from raytune_llm.train.optimizers.by_tensor import ByTensor
from raytune_llm.train.optimizers.groups import set_learning_rate
from raytune_llm.train.strategies.base import Precision, StepOut, trained


class OwnOptimizer:
    """Gradients are averaged over workers as they meet, trained parameters and optimizer state are tensors or DTensors."""

    def __init__(
        self,
        module: Policy,
        build_optimizer: Any,
        *,
        world: int,
        device: torch.device,
        precision: Precision,
        max_grad_norm: float | None,
    ) -> None:
        self.module, self.world = module, world
        self.optimizer = build_optimizer(module, fused=True)
        self.max_grad_norm = max_grad_norm
        self.scale = LossScale(device, enabled=precision.scales_loss)

    def backward(self, loss: Tensor) -> None:
        (loss * (self.world * self.scale.scale)).backward()  # shares are to be added, not averaged

    def step(self, lr: float) -> StepOut:
        return clipped_step(self.optimizer, [p for _, p in trained(self.module)], lr, self.max_grad_norm, self.scale)

    def state(self) -> dict[str, Tensor]:
        return optimizer_state(trained(self.module), self.optimizer)

    def load(self, kept: Mapping[str, Tensor], read: Any) -> None:
        load_optimizer_state(trained(self.module), self.optimizer, kept, read)

    def averaged(self) -> AbstractContextManager[None]:
        return self.optimizer.averaged() if isinstance(self.optimizer, ByTensor) else nullcontext()

    def full_parameters(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        with self.averaged():
            for name, parameter in trained(self.module, frozen=frozen):
                whole = parameter.detach()
                yield name, (whole.full_tensor() if isinstance(whole, DTensor) else whole).to("cpu", copy=True)


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2017), on the device: halved when a step overflows, doubled after 2,000
    good ones."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.scale = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.enabled = enabled

    def update(self, overflow: Tensor) -> None:
        if not self.enabled:
            return
        self.good_steps = torch.where(overflow, 0.0, self.good_steps + 1)
        grown = self.good_steps >= 2000
        self.scale = torch.where(overflow, self.scale / 2, torch.where(grown, self.scale * 2, self.scale)).clamp(1.0, 2.0**24)
        self.good_steps = torch.where(grown, 0.0, self.good_steps)


def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], lr: float, max_grad_norm: float | None, scale: LossScale
) -> StepOut:
    """Clip by global norm (Pascanu et al. 2013), step, clear; a gradient that is not finite changes nothing.

    An optimizer that supports it scales the gradient while reading it, and skips the step on the device. For any other, the
    gradient is scaled in place, and the host waits for the device to know whether to step.
    """
    if isinstance(optimizer, ByTensor):
        parameters = optimizer.in_turn(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(scale.scale.device) / scale.scale
    overflow = ~torch.isfinite(norm)
    shrink = 1 / scale.scale
    if max_grad_norm is not None:
        shrink = shrink * torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)
    set_learning_rate(optimizer.param_groups, lr)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # torch.amp's own protocol: they divide by the one and skip themselves by the other. They take them where the parameters
        # are, and would not wait for a copy to host memory.
        where = parameters[0].device
        optimizer.grad_scale = shrink.reciprocal().to(where)  # type: ignore[attr-defined]
        optimizer.found_inf = overflow.float().to(where)  # type: ignore[attr-defined]
        optimizer.step()
    elif not overflow.item():
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        torch._foreach_mul_(local, shrink.to(local[0].device))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scale.update(overflow)
    return StepOut(grad_norm=norm, skipped=overflow)


Named = Sequence[tuple[str, nn.Parameter]]


def optimizer_state(trained: Named, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, parameter in trained:
        state[f"parameters.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def load_optimizer_state(trained: Named, optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor], read: Any) -> None:
    """Optimizers make their state in the first step; here it is laid out as the checkpoint has it, then read."""
    for name, parameter in trained:
        prefix = f"optimizer.{name}."
        for key in (full[len(prefix) :] for full in kept if full.startswith(prefix)):
            like = kept[prefix + key]
            if like.shape != parameter.shape:
                made = torch.zeros_like(like, device=parameter.device)
            elif isinstance(optimizer, ByTensor):
                made = optimizer.zeros(parameter, tuple(like.shape), like.dtype)
            else:
                made = torch.zeros_like(parameter, dtype=like.dtype)
            optimizer.state[parameter][key] = made
    read(optimizer_state(trained, optimizer))

"""One step of an optimizer: unscale and clip the gradient (whole or sharded), and skip the step if it is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytune_llm.train.optimizers.by_tensor import ByTensor
from raytune_llm.train.optimizers.groups import set_learning_rate
from raytune_llm.train.strategies.base import StepOut


class LossScale:
    """Dynamic loss scaling for fp16 on the device (Micikevicius et al. 2017): halved when a step overflows, doubled after 2,000
    steps without overflow."""

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
    """Clip by global norm (Pascanu et al. 2013), step, and clear the gradient. A gradient that is not finite changes nothing."""
    if isinstance(optimizer, ByTensor):
        parameters = optimizer.in_turn(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = norm_of(grads, scale.scale.device) / scale.scale
    overflow = ~torch.isfinite(norm)
    shrink = 1 / scale.scale
    if max_grad_norm is not None:
        shrink = shrink * torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)
    set_learning_rate(optimizer.param_groups, lr)
    step_unless(overflow, optimizer, grads, shrink=shrink)
    scale.update(overflow)
    return StepOut(grad_norm=norm, skipped=overflow)


def norm_of(grads: list[Tensor], device: torch.device) -> Tensor:
    """The norm of all gradients together, over all shards."""
    norm = torch.nn.utils.get_total_norm(grads)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device)


def skips_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer supports torch.amp's protocol: it scales gradients and skips steps on the device."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def sent(flag: Tensor) -> Callable[[], bool]:
    """Start copying a flag to the host. The returned function waits for the copy."""
    if not flag.is_cuda:
        return flag.item  # type: ignore[return-value]
    there, arrived = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def read() -> bool:
        arrived.synchronize()
        return bool(there)

    return read


def step_unless(
    skipped: Tensor,
    optimizer: torch.optim.Optimizer,
    grads: list[Tensor],
    *,
    shrink: Tensor | None = None,
    read: Callable[[], bool] | None = None,
) -> None:
    """Step unless `skipped`, and clear the gradients. shrink: a factor of the gradients. read: gives `skipped` on the host, if it
    was copied there before.

    If the optimizer does not support it, gradients are scaled in place, and the host waits to know whether to step.
    """
    if skips_itself(optimizer):
        # Both must be on the parameters' device.
        where = grads[0].device if grads else skipped.device
        optimizer.grad_scale = None if shrink is None else shrink.reciprocal().to(where)  # type: ignore[attr-defined]
        optimizer.found_inf = skipped.float().to(where)  # type: ignore[attr-defined]
        optimizer.step()
    elif not (read or skipped.item)():
        if shrink is not None:
            local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
            torch._foreach_mul_(local, shrink.to(local[0].device))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)

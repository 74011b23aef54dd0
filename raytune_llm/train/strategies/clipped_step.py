"""One step of an optimizer: unscale and clip the gradient (whole or sharded), and skip the step if it is not finite."""

from __future__ import annotations

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
    """Clip by global norm (Pascanu et al. 2013), step, and clear the gradient. A gradient that is not finite changes nothing.

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
        # torch.amp's protocol: the optimizer divides by grad_scale and skips the step if found_inf is set. Both must be on the
        # parameters' device.
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

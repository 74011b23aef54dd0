"""What the loop asks of a strategy, and the step that those share which keep torch's own optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Precision:
    """Frozen weights are kept in `compute`, trained ones in float32; matrix products run in `compute`."""

    compute: torch.dtype

    @property
    def scales_loss(self) -> bool:
        return self.compute == torch.float16


@dataclass(frozen=True, slots=True)
class StepOut:
    """Tensors on the device, so that nobody waits for them. A step with a non-finite gradient changed nothing."""

    grad_norm: Tensor
    skipped: Tensor


class Strategy(Protocol):
    @property
    def model(self) -> nn.Module:
        """What to call: the CausalLM, wrapped or not."""
        ...

    @property
    def world(self) -> int:
        """Workers."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; gradients meet over workers in the last one only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """`loss` is this worker's share: its sum over the count of the whole step. Shares add up over workers."""
        ...

    def step(self, lr: float) -> StepOut: ...

    def state(self) -> dict[str, Tensor]:
        """Trained parameters as parameters.<name>, optimizer state as optimizer.<name>.<key>: whole tensors or DTensors,
        the same names and sizes under every strategy and world size."""
        ...

    def load(self, sizes: Mapping[str, torch.Size], read: Any) -> None:
        """Fill parameters and optimizer state. `sizes` are those in the checkpoint; read(state) fills tensors in place."""
        ...

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter whole, on the CPU, in float32 or as kept. All workers must go through it together."""
        ...


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
    """Clip by global norm (Pascanu et al. 2013), step, clear. The fused optimizer scales the gradient as it reads it."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(scale.scale.device) / scale.scale
    overflow = ~torch.isfinite(norm)
    shrink = 1 / scale.scale
    if max_grad_norm is not None:
        shrink = shrink * torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # torch.amp's own protocol for fused optimizers: they divide by the one and skip themselves by the other
    optimizer.grad_scale = shrink.reciprocal()  # type: ignore[attr-defined]
    optimizer.found_inf = overflow.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scale.update(overflow)
    return StepOut(grad_norm=norm, skipped=overflow)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, parameter in trained(model):
        state[f"parameters.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, sizes: Mapping[str, torch.Size], read: Any) -> None:
    """Optimizers make their state in the first step; here it is laid out as the checkpoint has it, then read."""
    for name, parameter in trained(model):
        prefix = f"optimizer.{name}."
        for key in (full[len(prefix) :] for full in sizes if full.startswith(prefix)):
            size = sizes[prefix + key]
            like = (
                torch.zeros_like(parameter, dtype=torch.float32)
                if size == parameter.shape
                else torch.zeros(size, device=parameter.device)
            )
            optimizer.state[parameter][key] = like
    read(optimizer_state(model, optimizer))


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

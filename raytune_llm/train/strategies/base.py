"""What the loop asks of a strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raytune_llm.models.policy import Policy


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
    """[], float32: the norm of the gradient over all trained parameters and workers, before clipping."""
    skipped: Tensor
    """[], bool: the gradient was not finite."""


class Strategy(Protocol):
    @property
    def model(self) -> nn.Module:
        """What to call: the Policy, wrapped or not."""
        ...

    @property
    def module(self) -> Policy:
        """The Policy itself."""
        ...

    @property
    def world(self) -> int:
        """Workers."""
        ...

    @property
    def sharded(self) -> bool:
        """Parameters are spread over workers, who must call the model, and each part of it, together."""
        ...

    def parts(self) -> AbstractContextManager[None]:
        """Around calls of parts of `module` that do not go through `model`: generation."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; gradients meet over workers in the last one only."""
        ...

    def backward(self, loss: Tensor, lr: float) -> None:
        """`loss` is this worker's share: its sum over the count of the whole step. Shares add up over workers. lr: as for `step`,
        where tensors step in the backward pass (optimizer.layerwise)."""
        ...

    def step(self, lr: float) -> StepOut:
        """Clip the gradient, and update the parameters with it unless it is not finite; then clear it. lr: before the factors of
        parameter groups."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Trained parameters as parameters.<name>, optimizer state as optimizer.<name>.<key>: whole tensors or DTensors,
        the same names and sizes under every strategy and world size."""
        ...

    def load(self, kept: Mapping[str, Tensor], read: Any) -> None:
        """Fill parameters and optimizer state. `kept`: what the checkpoint holds, on the meta device; read(state) fills
        tensors in place."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Around evaluation: parameters are those that would be saved, where the optimizer takes gradients at others. All workers
        enter it together."""
        ...

    def full_parameters(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter whole, as it is to be saved, on the CPU, in float32 or as kept; with `frozen`, all others too.
        All workers must go through it together."""
        ...


def trained(model: nn.Module, *, frozen: bool = False) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters; with `frozen`, all others too."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad or frozen]

"""The interface between the loop and a strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raytune_llm.models.policy import Policy


@dataclass(frozen=True, slots=True)
class Training:
    """How a run trains, whatever its strategy."""

    device: torch.device
    compute: torch.dtype
    """Matrix products run in it, and frozen weights are kept in it; trained ones are in float32."""
    max_grad_norm: float | None
    layerwise: bool = False
    """Tensors step within the backward pass."""

    @property
    def scales_loss(self) -> bool:
        return self.compute == torch.float16


@dataclass(frozen=True, slots=True)
class StepOut:
    """The result of a step. Its tensors stay on the device, so that the host does not wait. A step with a non-finite gradient
    changed nothing."""

    grad_norm: Tensor
    """[], float32: the norm of the gradient over all trained parameters and workers, before clipping."""
    skipped: Tensor
    """[], bool: the gradient was not finite."""


class Strategy(Protocol):
    @property
    def model(self) -> nn.Module:
        """The module to call for a forward pass: the Policy, or its wrapper."""
        ...

    @property
    def module(self) -> Policy:
        """The Policy itself."""
        ...

    @property
    def world(self) -> int:
        """The number of workers."""
        ...

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over workers, so that all must call the model, and each part of it, together."""
        ...

    def parts(self) -> AbstractContextManager[None]:
        """A context for calling parts of `module` directly instead of `model`, as generation does."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """A context for forward and backward of one micro-batch. Gradients are reduced over workers in the last one only."""
        ...

    def backward(self, loss: Tensor, lr: float) -> None:
        """loss: this worker's sum divided by the count of the whole step, so that the losses of all workers add up. lr: as in
        `step`, for tensors that step within the backward pass (optimizer.layerwise)."""
        ...

    def step(self, lr: float) -> StepOut:
        """Clip the gradient, update the parameters unless it is not finite, and clear it. lr: the schedule's learning rate,
        before the factors of parameter groups."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Trained parameters as parameters.<name>, and optimizer state as optimizer.<name>.<key>. They are whole tensors or
        DTensors, with the same names and global shapes under every strategy and world size."""
        ...

    def before_change(self, call: Callable[[], None]) -> None:
        """Have it called each time before tensors of an earlier `state` change, as they do in a step."""
        ...

    def load(self, kept: Mapping[str, Tensor], read: Any) -> None:
        """Load parameters and optimizer state. kept: the checkpoint's tensors on the meta device. read(state): fills tensors in
        place."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """A context for evaluation, in which parameters have the values to save; some optimizers take gradients at others. All
        workers enter it together."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """A context in which the policy is the same as at the start of the run (Policy.reference)."""
        ...

    def full_parameters(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter in full, as it is to be saved: on the CPU, in float32 or its own type. frozen: all others too.
        All workers must iterate together."""
        ...

    def close(self) -> None:
        """Restore the process for a following run. The model is not used afterwards."""
        ...


def trained(model: nn.Module, *, frozen: bool = False) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters by name. frozen: all others too."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad or frozen]

"""The base of strategies that use a torch optimizer directly: backward pass, step and state, for whole or sharded gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytune_llm.models.policy import Policy
from raytune_llm.train.optimizers.by_tensor import ByTensor
from raytune_llm.train.strategies.base import StepOut, Training, trained
from raytune_llm.train.strategies.clipped_step import LossScale, clipped_step
from raytune_llm.train.strategies.layerwise import Layerwise


class OwnOptimizer:
    """Gradients are averaged over workers. Trained parameters and optimizer state are tensors or DTensors."""

    def __init__(
        self,
        module: Policy,
        build_optimizer: Any,
        training: Training,
        *,
        world: int,
        meet: Callable[[Tensor], None] | None = None,
    ) -> None:
        """meet: averages a gradient over workers before its tensor steps, if nothing else has averaged it by then."""
        self.module, self.world = module, world
        self.optimizer = build_optimizer(module.model, fused=True)  # names there are those that were checked before
        self._before_change: list[Callable[[], None]] = []
        self.max_grad_norm = training.max_grad_norm
        self.scale = LossScale(training.device, enabled=training.scales_loss)
        parameters = (parameter for _, parameter in trained(module))
        self.layerwise = Layerwise(self.optimizer, parameters, training.device, meet) if training.layerwise else None

    def backward(self, loss: Tensor, lr: float) -> None:
        if self.layerwise is not None:
            self.layerwise.lr = lr
        (loss * (self.world * self.scale.scale)).backward()  # times world, since gradients are averaged and must be summed

    def step(self, lr: float) -> StepOut:
        if self.layerwise is not None:
            return self.layerwise.finish()
        return clipped_step(self.optimizer, [p for _, p in trained(self.module)], lr, self.max_grad_norm, self.scale)

    def state(self) -> dict[str, Tensor]:
        return optimizer_state(trained(self.module), self.optimizer)

    def before_change(self, call: Callable[[], None]) -> None:
        self._before_change.append(call)
        self.optimizer.register_step_pre_hook(lambda *_: call())

    def load(self, kept: Mapping[str, Tensor], read: Any) -> None:
        load_optimizer_state(trained(self.module), self.optimizer, kept, read)

    def averaged(self) -> AbstractContextManager[None]:
        self._will_change()
        return self.optimizer.averaged() if isinstance(self.optimizer, ByTensor) else nullcontext()

    def reference(self) -> AbstractContextManager[None]:
        self._will_change()
        return self.module.reference()

    def _will_change(self) -> None:
        for call in self._before_change:
            call()

    def full_parameters(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        with self.averaged():
            for name, parameter in trained(self.module, frozen=frozen):
                whole = parameter.detach()
                yield name, (whole.full_tensor() if isinstance(whole, DTensor) else whole).to("cpu", copy=True)

    def close(self) -> None:
        if self.layerwise is not None:
            self.layerwise.close()


Named = Sequence[tuple[str, nn.Parameter]]


def optimizer_state(trained: Named, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, parameter in trained:
        state[f"parameters.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def load_optimizer_state(trained: Named, optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor], read: Any) -> None:
    """Load optimizer state. torch's optimizers create it in their first step, so it is allocated from the checkpoint's shapes."""
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

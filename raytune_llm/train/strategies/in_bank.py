"""The strategy of one of several runs that train in one pass over one base: its adapter is a part of a bank of adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from raytune_llm.models.policy import Policy
from raytune_llm.models.shared_pass import OneOfSeveral, SharedPass
from raytune_llm.train.optimizers.groups import Trained
from raytune_llm.train.strategies.base import StepOut, Training
from raytune_llm.train.strategies.clipped_step import LossScale, clipped_step
from raytune_llm.train.strategies.own_optimizer import load_optimizer_state, optimizer_state

PREFIX = "model."
"""The name of the model within the policy, so that parameters have the same names as in a run by itself."""


class InBank:
    """Implements Strategy. The parameters are slices of the bank, and the losses of all runs share one backward pass."""

    sharded, world = False, 1

    def __init__(
        self,
        pass_: SharedPass,
        model: OneOfSeveral,
        build_optimizer: Callable[[Sequence[Trained]], torch.optim.Optimizer],
        training: Training,
    ) -> None:
        self.model, self.module = model, pass_.policy
        self._bank, self._max_grad_norm = pass_.bank, training.max_grad_norm
        self._named = {name: nn.Parameter(value) for name, value in self._bank.part(model.name).items()}
        trained = [Trained(name, parameter, _layer(name)) for name, parameter in self._named.items()]
        self.optimizer = build_optimizer(trained)
        self._scale = LossScale(training.device, enabled=training.scales_loss)
        self.losses: list[Tensor] = []
        """The losses of this step, which wait for the backward pass that is shared with other runs."""

    def parts(self) -> AbstractContextManager[Any]:
        return self._bank.using(self.model.name)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor, lr: float) -> None:
        self.losses.append(loss * self._scale.scale)

    def step(self, lr: float) -> StepOut:
        for name, gradient in self._bank.part(self.model.name, gradient=True).items():
            self._named[name].grad = gradient
        return clipped_step(self.optimizer, list(self._named.values()), lr, self._max_grad_norm, self._scale)

    def moved(self) -> None:
        """Called after the bank was resized: find the parameters again."""
        for name, place in self._bank.part(self.model.name).items():
            self._named[name].data = place

    def state(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in optimizer_state(self._pairs, self.optimizer).items()}

    def before_change(self, call: Callable[[], None]) -> None:
        self.optimizer.register_step_pre_hook(lambda *_: call())

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()  # a run whose optimizer averages weights never shares a pass

    def reference(self) -> AbstractContextManager[None]:
        return self.module.reference()

    def load(self, kept: Mapping[str, Tensor], read: Any) -> None:
        def fill(state: dict[str, Tensor]) -> None:
            whole = {name: value.contiguous() for name, value in state.items()}
            read(whole)
            for name, value in state.items():
                value.copy_(whole[name])

        load_optimizer_state(self._pairs, self.optimizer, kept, fill)

    def full_parameters(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._pairs:
            yield name, parameter.detach().cpu().contiguous()

    def close(self) -> None:
        pass

    @property
    def _pairs(self) -> list[tuple[str, nn.Parameter]]:
        return [(PREFIX + name, parameter) for name, parameter in self._named.items()]


def _layer(name: str) -> int:
    """The number in a name such as model.layers.3.mlp.up_proj.lora_A.weight."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def backward(strategies: list[InBank]) -> None:
    """One backward pass for the losses of all runs."""
    torch.stack([loss for strategy in strategies for loss in strategy.losses]).sum().backward()
    for strategy in strategies:
        strategy.losses.clear()


def clear_gradients(policy: Policy) -> None:
    """Clear the gradients, after all runs have stepped."""
    for parameter in policy.parameters():
        parameter.grad = None

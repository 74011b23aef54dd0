"""Steps within the backward pass: each trained tensor steps as soon as its gradient is complete, and the gradient is freed.

So only a few gradients exist at the same time, while a plain step needs all of them (Lv et al. 2023, arXiv 2306.09782). A tensor
steps before the whole gradient is known: the gradient can't be clipped by its norm, and a tensor steps even if another one's
gradient is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from raytune_llm.errors import ConfigError
from raytune_llm.train.strategies.base import StepOut
from raytune_llm.train.strategies.clipped_step import LossScale, clipped_step


class Layerwise:
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        meet: Callable[[Tensor], None] | None = None,
    ) -> None:
        """meet: reduces a gradient over workers before its tensor steps, if nothing else does so."""
        self._optimizer, self._meet = optimizer, meet
        self._unscaled = LossScale(device, enabled=False)
        self._device, self._done = device, list[StepOut]()
        self.lr = 0.0
        """The learning rate of the step that the backward pass makes."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if self._meet is not None:
            self._meet(parameter.grad)
        self._done.append(clipped_step(self._optimizer, [parameter], self.lr, None, self._unscaled))

    def finish(self) -> StepOut:
        """The norm of the whole gradient, and whether tensors were skipped because their gradients were not finite."""
        norms, skipped = ([getattr(done, name) for done in self._done] for name in ("grad_norm", "skipped"))
        self._done.clear()
        if not norms:
            return StepOut(grad_norm=torch.zeros((), device=self._device), skipped=torch.zeros((), device=self._device).bool())
        return StepOut(grad_norm=torch.stack(norms).norm(), skipped=torch.stack(skipped).any())


def check_accumulates(*, last: bool) -> None:
    """Raises ConfigError for a micro-batch that is not the last of its step, since its gradient can't accumulate."""
    if not last:
        rule = "must be false where a step has several micro-batches: each gradient is used up as soon as it is there"
        fix = "Raise train.micro_batch_size to train.global_batch_size / workers, or set optimizer.layerwise=false."
        raise ConfigError("optimizer.layerwise", rule, got=True, fix=fix)

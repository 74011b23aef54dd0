"""Steps within the backward pass: each trained tensor steps as soon as its gradient is complete, and the gradient is freed.

So no more than a few gradients are there at once, where a plain step has all of them (Lv et al. 2023, arXiv 2306.09782). Nothing
of the whole gradient can be known before a tensor steps: it is not clipped by its norm, and not left out where another tensor's
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
        """meet: makes a worker's gradient that of all, where nothing else does before the tensor steps."""
        self._optimizer, self._meet = optimizer, meet
        self._unscaled = LossScale(device, enabled=False)
        self._device, self._done = device, list[StepOut]()
        self.lr = 0.0
        """Of the step that a backward pass makes."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if self._meet is not None:
            self._meet(parameter.grad)
        self._done.append(clipped_step(self._optimizer, [parameter], self.lr, None, self._unscaled))

    def finish(self) -> StepOut:
        """The norm of the whole gradient, and whether a part of it was not finite, and so was left out."""
        norms, skipped = ([getattr(done, name) for done in self._done] for name in ("grad_norm", "skipped"))
        self._done.clear()
        if not norms:
            return StepOut(grad_norm=torch.zeros((), device=self._device), skipped=torch.zeros((), device=self._device).bool())
        return StepOut(grad_norm=torch.stack(norms).norm(), skipped=torch.stack(skipped).any())


def check_accumulates(*, last: bool) -> None:
    """Raises ConfigError for a micro-batch that is not its step's last: its gradient would be gone by then."""
    if not last:
        rule = "must be false where a step has several micro-batches: each gradient is used up as soon as it is there"
        fix = "Raise train.micro_batch_size to train.global_batch_size / workers, or set optimizer.layerwise=false."
        raise ConfigError("optimizer.layerwise", rule, got=True, fix=fix)

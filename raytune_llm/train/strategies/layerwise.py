"""Steps within the backward pass: each trained tensor steps as soon as its gradient is complete, and the gradient is freed.

So only a few gradients exist at the same time, while a plain step needs all of them (Lv et al. 2023, arXiv 2306.09782). A tensor
steps before the whole gradient is known: the gradient can't be clipped by its norm, and a tensor steps even if another one's
gradient is not finite.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from raytune_llm.errors import ConfigError
from raytune_llm.train.optimizers.groups import set_learning_rate
from raytune_llm.train.strategies.base import StepOut
from raytune_llm.train.strategies.clipped_step import norm_of, sent, skips_itself, step_unless

BEHIND = 2
"""Gradients that a GPU completes before the host checks whether an earlier one is finite, so that the GPU never waits."""


class Layerwise:
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        meet: Callable[[Tensor], None] | None = None,
    ) -> None:
        """meet: reduces a gradient over workers before its tensor steps, if nothing else does so."""
        self._optimizer, self._meet, self._device = optimizer, meet, device
        self._groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        self.behind = BEHIND if device.type == "cuda" and not skips_itself(optimizer) else 0
        """The number of tensors whose steps are delayed."""
        self._waiting, self._done = deque[Callable[[], None]](), list[StepOut]()
        self.lr = 0.0
        """The learning rate of the step that the backward pass makes."""
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._completed) for parameter in parameters]

    def close(self) -> None:
        """Let go of the parameters: their hooks refer to what refers to them, and the device would keep both."""
        for hook in self._hooks:
            hook.remove()

    def _completed(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if self._meet is not None:
            self._meet(parameter.grad)
        norm = norm_of([parameter.grad], self._device)
        skipped = ~torch.isfinite(norm)
        self._done.append(StepOut(grad_norm=norm, skipped=skipped))
        self._waiting.append(partial(self._step, parameter, skipped, sent(skipped) if self.behind else None))
        self._step_all_but(self.behind)

    def _step_all_but(self, last: int) -> None:
        while len(self._waiting) > last:
            self._waiting.popleft()()

    def _step(self, parameter: nn.Parameter, skipped: Tensor, read: Callable[[], bool] | None) -> None:
        assert parameter.grad is not None
        with self._alone(parameter):
            step_unless(skipped, self._optimizer, [parameter.grad], read=read)

    @contextmanager
    def _alone(self, parameter: nn.Parameter) -> Iterator[None]:
        """Let the optimizer see only this tensor, so that its step does not iterate over all others."""
        own, whole = self._groups[parameter], [(group, group["params"]) for group in self._optimizer.param_groups]
        set_learning_rate([own], self.lr)
        for group, _ in whole:
            group["params"] = [parameter] if group is own else []
        try:
            yield
        finally:
            for group, parameters in whole:
                group["params"] = parameters

    def finish(self) -> StepOut:
        """The norm of the whole gradient, and whether tensors were skipped because their gradients were not finite."""
        self._step_all_but(0)
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

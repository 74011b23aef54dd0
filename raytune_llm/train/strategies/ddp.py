from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.train.strategies.base import (
    LossScale,
    Precision,
    StepOut,
    clipped_step,
    load_optimizer_state,
    optimizer_state,
    trained,
)


class DDPStrategy:
    """The whole model on every worker; one worker without a process group is the plain case of it."""

    def __init__(
        self, model: CausalLM, build_optimizer: Any, *, device: torch.device, precision: Precision, max_grad_norm: float | None
    ) -> None:
        self.module = model.to(device)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.model: nn.Module = self.module
        if self.world > 1:
            self.model = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.optimizer = build_optimizer(self.module.named_parameters(), fused=True)
        self.max_grad_norm = max_grad_norm
        self.scale = LossScale(device, enabled=precision.scales_loss)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or not isinstance(self.model, DistributedDataParallel) else self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        (loss * (self.world * self.scale.scale)).backward()  # DDP averages; shares are to be added

    def step(self, lr: float) -> StepOut:
        return clipped_step(self.optimizer, [p for _, p in trained(self.module)], lr, self.max_grad_norm, self.scale)

    def state(self) -> dict[str, Tensor]:
        return optimizer_state(self.module, self.optimizer)

    def load(self, sizes: Mapping[str, torch.Size], read: Any) -> None:
        load_optimizer_state(self.module, self.optimizer, sizes, read)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trained(self.module):
            yield name, parameter.detach().cpu()

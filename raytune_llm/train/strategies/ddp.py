from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytune_llm.models.policy import Policy
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.layerwise import check_accumulates
from raytune_llm.train.strategies.own_optimizer import OwnOptimizer


class DDPStrategy(OwnOptimizer):
    """The whole model on every worker. It also serves a single worker without a process group."""

    sharded = False

    def __init__(self, model: Policy, build_optimizer: Any, training: Training) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.model: nn.Module = model.to(training.device)
        meet = partial(_average, world=world) if world > 1 else None
        super().__init__(self.model, build_optimizer, training, world=world, meet=meet)
        if world > 1 and not training.layerwise:  # DDP's buckets would hold all gradients until the last one is complete
            # Every worker has loaded frozen weights by itself; quantized ones are buffers, which DDP would send in every pass.
            frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            buffers = [name for name, _ in model.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        if self.layerwise is not None:
            check_accumulates(last=last)
        return nullcontext() if last or not isinstance(self.model, DistributedDataParallel) else self.model.no_sync()

    def parts(self) -> AbstractContextManager[None]:
        return nullcontext()


def _average(gradient: Tensor, *, world: int) -> None:
    dist.all_reduce(gradient)
    gradient /= world

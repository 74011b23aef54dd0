from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.policy import layers
from raytune_llm.train.strategies.base import Precision
from raytune_llm.train.strategies.own_optimizer import OwnOptimizer


class FSDPStrategy(OwnOptimizer):
    """FSDP2: one unit a layer, and the root, which holds embedding, final norm and head and gathers them once a pass."""

    def __init__(
        self,
        model: CausalLM,
        build_optimizer: Any,
        *,
        device: torch.device,
        precision: Precision,
        max_grad_norm: float | None,
        reshard: bool,
        offload: bool,
    ) -> None:
        world = dist.get_world_size()
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        mixed = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        settings: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": mixed,
            "reshard_after_forward": reshard,
            "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        }
        model = model if offload else model.to(device)
        for layer in layers(model):
            fully_shard(layer, **settings)
        fully_shard(model, **settings)
        self.model = model
        super().__init__(model, build_optimizer, world=world, device=device, precision=precision, max_grad_norm=max_grad_norm)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

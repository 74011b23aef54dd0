from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.policy import layers
from raytune_llm.train.strategies.base import (
    LossScale,
    Precision,
    StepOut,
    clipped_step,
    load_optimizer_state,
    optimizer_state,
    trained,
)


class FSDPStrategy:
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
        self.world = dist.get_world_size()
        mesh = init_device_mesh(device.type, (self.world,), mesh_dim_names=("shard",))
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
        self.model = self.module = model
        self.optimizer = build_optimizer(model.named_parameters(), fused=True)
        self.max_grad_norm = max_grad_norm
        self.scale = LossScale(device, enabled=precision.scales_loss)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * (self.world * self.scale.scale)).backward()  # the reduction averages; shares are to be added

    def step(self, lr: float) -> StepOut:
        return clipped_step(self.optimizer, [p for _, p in trained(self.module)], lr, self.max_grad_norm, self.scale)

    def state(self) -> dict[str, Tensor]:
        return optimizer_state(self.module, self.optimizer)

    def load(self, sizes: Mapping[str, torch.Size], read: Any) -> None:
        load_optimizer_state(self.module, self.optimizer, sizes, read)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trained(self.module):
            whole = parameter.detach()
            yield name, (whole.full_tensor() if isinstance(whole, DTensor) else whole).cpu()

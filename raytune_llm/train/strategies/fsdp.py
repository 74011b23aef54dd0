from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raytune_llm.errors import ConfigError
from raytune_llm.models.layers import layers
from raytune_llm.models.policy import Policy
from raytune_llm.models.quantization import QuantizedLinear
from raytune_llm.models.stored import Stored
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.layerwise import check_accumulates
from raytune_llm.train.strategies.own_optimizer import OwnOptimizer

TORCH_OF_WHOLE_NUMBERS = (2, 13)
"""2.11 can't (tried), 2.13 can."""
RESHARD = {"full": True, "grad_only": False}


class FSDPStrategy(OwnOptimizer):
    """FSDP2 with one unit per layer, and a root unit with embedding, final norm and head, which is gathered once per pass.

    If a weight is in a file, every worker reads its own rows from there. All other weights are sent by rank 0; the models of the
    other workers may be on the meta device.
    """

    sharded = True

    def __init__(
        self,
        model: Policy,
        build_optimizer: Any,
        training: Training,
        *,
        reshard: str,
        shard_workers: int | str,
        prefetch: int,
        offload: bool,
    ) -> None:
        device = training.device
        if offload and device.type == "cpu":
            raise ConfigError("strategy.offload", "must be false without a GPU, where everything is in host memory", got=True)
        world = dist.get_world_size()
        mesh = _mesh(device.type, world, world if shard_workers == "all" else int(shard_workers))
        mixed = MixedPrecisionPolicy(param_dtype=training.compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        settings: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": mixed,
            "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        }
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                check_torch(torch.__version__)
                module.shard()
        units: list[Any] = list(layers(model))
        for unit in (*units, model):
            # One unit at a time, so that no worker holds more than its shards and one unit.
            in_files = _receive(unit, device)
            # The root stays gathered after the forward pass, since the backward pass begins with it.
            fully_shard(unit, **settings, reshard_after_forward=RESHARD[reshard] and unit is not model)
            _read(in_files)
        if prefetch > 1:
            for number, unit in enumerate(units):
                unit.set_modules_to_forward_prefetch(units[number + 1 : number + 1 + prefetch])
                unit.set_modules_to_backward_prefetch(units[max(number - prefetch, 0) : number][::-1])
        self.model: Any = model
        self.units: list[Any] = [*units, model]
        super().__init__(model, build_optimizer, training, world=world)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        if self.layerwise is not None:
            check_accumulates(last=last)
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        self._reshard()
        return super().state()

    def load(self, kept: Mapping[str, Tensor], read: Any) -> None:
        self._reshard()
        super().load(kept, read)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self._reshard()
        with super().averaged():
            yield
            self._reshard()

    def full_parameters(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        self._reshard()
        yield from super().full_parameters(frozen=frozen)

    def _reshard(self) -> None:
        """Free gathered parameters, which FSDP keeps after a forward pass without a backward pass."""
        for unit in self.units:
            unit.reshard()

    @contextmanager
    def parts(self) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.unshard()  # only the root unit (embedding, norm, head); layers are gathered when they are called
        try:
            yield
        finally:
            self.model.reshard()


def check_torch(version: str) -> None:
    """Raises ConfigError for a torch whose fully_shard wants gradients of every weight, which whole numbers can't have."""
    if tuple(map(int, version.split(".")[:2])) < TORCH_OF_WHOLE_NUMBERS:
        rule = f"can't shard a quantized base with torch {version.partition('+')[0]}"
        raise ConfigError("strategy", rule, fix="Install torch 2.13, or set strategy=ddp, or quantization=none.")


@cache
def _mesh(device_type: str, world: int, shard_workers: int) -> DeviceMesh:
    """The device mesh: neighbouring workers share a copy of the model, and several copies add a dimension to the mesh. The last
    dimension is reserved for context or tensor parallelism, which does not exist yet. Runs of one process share the groups."""
    if world % shard_workers:
        raise ConfigError(
            "strategy.shard_workers",
            f"must divide the {world} workers",
            got=shard_workers,
            fix="For example, the GPUs of a node.",
        )
    names = ("replicate", "shard", "split")
    mesh = init_device_mesh(device_type, (world // shard_workers, shard_workers, 1), mesh_dim_names=names)
    return mesh["shard"] if shard_workers == world else mesh["replicate", "shard"]


def _receive(unit: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, Stored]]:
    """Send rank 0's weights and buffers of a unit to every worker's device. Tied weights stay tied, and sharded ones are skipped.
    Returns the parameters that must still be read from files, each once; they have no values yet."""
    moved: dict[Tensor, Tensor] = {}
    in_files = []
    for module in unit.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if tensor not in moved:
                    if isinstance(tensor, Stored):
                        in_files.append((module, name, tensor))
                        here = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    else:
                        here = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
                        here = here.contiguous()
                        dist.broadcast(here, src=0)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[tensor] = nn.Parameter(here, requires_grad=tensor.requires_grad) if is_parameter else here
                kept[name] = moved[tensor]  # type: ignore[assignment]
    return in_files


@torch.no_grad()
def _read(in_files: Iterable[tuple[nn.Module, str, Stored]]) -> None:
    """Read this worker's rows of each weight from its file."""
    for module, name, stored in in_files:
        shard: Any = module.get_parameter(name)
        shape, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
        if shape[0]:
            shard.to_local().copy_(stored.rows(offset[0], offset[0] + shape[0]))

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import PositiveInt, section


@section
class DDP:
    """Every worker holds the whole model; gradients are summed over workers."""

    name: Literal["ddp"]
    option: ClassVar[str] = "ddp"
    shards: ClassVar[bool] = False
    """Weights, gradients or optimizer state are sharded over workers."""
    keeps_matrices: ClassVar[bool] = True
    """Parameters keep their shapes, whole or in shards that know them."""
    gathers_in_hooks: ClassVar[bool] = False
    """Weights are whole only while the layer that owns them is called: its hooks gather them."""

    def refuses_quantized(self, *, trained: bool) -> str | None:
        """Why it can't have quantized layers, frozen or trained ones; None where it can."""
        return None

    def weights_share(self, world: int) -> float:
        """The part of the weights that a worker has on its device between layers."""
        return 1


@section
class FSDP:
    """FSDP2 (`fully_shard`): parameters, gradients and optimizer state are sharded over workers, gathered layer by layer."""

    name: Literal["fsdp"]
    option: ClassVar[str] = "fsdp"
    shards: ClassVar[bool] = True
    keeps_matrices: ClassVar[bool] = True
    gathers_in_hooks: ClassVar[bool] = False
    reshard: Literal["full", "grad_only"]
    """full: gathered layers are given back after the forward pass and gathered again for the backward pass. grad_only: they are
    kept, and gradients and optimizer state alone stay sharded (more memory, less traffic)."""
    shard_workers: PositiveInt | Literal["all"]
    """Workers that share one copy of the model, say those of a node; copies meet in their gradients alone."""
    prefetch: PositiveInt
    """Layers that are gathered ahead of the one that runs."""
    offload: bool
    """Keep shards in host memory between uses."""

    def refuses_quantized(self, *, trained: bool) -> str | None:
        return None

    def weights_share(self, world: int) -> float:
        return 0 if self.offload else 1 / (world if self.shard_workers == "all" else self.shard_workers)


@section
class DeepSpeed:
    """ZeRO (Rajbhandari et al. 2019): stage 1 shards optimizer state, 2 gradients as well, 3 parameters as well."""

    name: Literal["deepspeed"]
    shards: ClassVar[bool] = True
    keeps_matrices: ClassVar[bool] = False
    stage: Literal[1, 2, 3]
    offload: bool
    """Keep optimizer state (and with stage 3 parameters) in host memory."""

    def weights_share(self, world: int) -> float:
        return 1 if self.stage < 3 else 0 if self.offload else 1 / world

    @property
    def option(self) -> str:
        """What chooses it: strategy=zero2."""
        return f"zero{self.stage}"

    @property
    def gathers_in_hooks(self) -> bool:
        return self.stage == 3

    def refuses_quantized(self, *, trained: bool) -> str | None:
        if trained:
            return "DeepSpeed casts every trained weight to one type"
        return "ZeRO-3 partitions weights of one type, and would leave these whole on every worker" if self.stage == 3 else None


StrategyConfig = Annotated[DDP | FSDP | DeepSpeed, Field(discriminator="name")]

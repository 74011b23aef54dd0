from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import PositiveInt, section


@section
class DDP:
    """Every worker holds the whole model, and gradients are summed over workers."""

    name: Literal["ddp"]
    option: ClassVar[str] = "ddp"
    shards: ClassVar[bool] = False
    """Weights, gradients or optimizer state are sharded over workers."""
    keeps_matrices: ClassVar[bool] = True
    """Parameters keep their shapes, so that optimizers can use matrices (ZeRO flattens them)."""
    gathers_in_hooks: ClassVar[bool] = False
    """Weights are gathered by hooks of the layer that owns them, so they are complete only while that layer is called."""

    def refuses_quantized(self, *, trained: bool) -> str | None:
        """The reason why it can't have quantized layers; None if it can. trained: the quantized layers are trained."""
        return None

    def weights_share(self, world: int) -> float:
        """The fraction of the weights that a worker keeps on its device between layers."""
        return 1


@section
class FSDP:
    """FSDP2 (`fully_shard`): parameters, gradients and optimizer state are sharded over workers, and weights are gathered layer
    by layer."""

    name: Literal["fsdp"]
    option: ClassVar[str] = "fsdp"
    shards: ClassVar[bool] = True
    keeps_matrices: ClassVar[bool] = True
    gathers_in_hooks: ClassVar[bool] = False
    reshard: Literal["full", "grad_only"]
    """full: free gathered weights after the forward pass, and gather them again for the backward pass. grad_only: keep them, so
    that only gradients and optimizer state stay sharded (more memory, less communication)."""
    shard_workers: PositiveInt | Literal["all"]
    """HSDP: the number of workers that share one copy of the model, for example those of a node. Copies exchange only
    gradients."""
    prefetch: PositiveInt
    """How many layers are gathered ahead of the one that runs."""
    offload: bool
    """Keep shards in host memory between uses."""

    def refuses_quantized(self, *, trained: bool) -> str | None:
        return None

    def weights_share(self, world: int) -> float:
        return 0 if self.offload else 1 / (world if self.shard_workers == "all" else self.shard_workers)


@section
class DeepSpeed:
    """ZeRO (Rajbhandari et al. 2019). Stage 1 shards optimizer state, stage 2 also gradients, stage 3 also parameters."""

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
        """The option that selects it, such as zero2."""
        return f"zero{self.stage}"

    @property
    def gathers_in_hooks(self) -> bool:
        return self.stage == 3

    def refuses_quantized(self, *, trained: bool) -> str | None:
        if trained:
            return "DeepSpeed casts every trained weight to one type"
        return "ZeRO-3 partitions weights of one type, and would leave these whole on every worker" if self.stage == 3 else None


StrategyConfig = Annotated[DDP | FSDP | DeepSpeed, Field(discriminator="name")]

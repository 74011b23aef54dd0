from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import section


@section
class DDP:
    """Every worker holds the whole model; gradients are summed over workers."""

    name: Literal["ddp"]


@section
class FSDP:
    """FSDP2 (`fully_shard`): parameters, gradients and optimizer state are sharded over workers, gathered layer by layer."""

    name: Literal["fsdp"]
    reshard: bool
    """Give gathered layers back after the forward pass (less memory) or keep them for the backward pass (less traffic)."""
    offload: bool
    """Keep shards in host memory between uses."""


@section
class DeepSpeed:
    """ZeRO (Rajbhandari et al. 2019): stage 1 shards optimizer state, 2 gradients as well, 3 parameters as well."""

    name: Literal["deepspeed"]
    stage: Literal[1, 2, 3]
    offload: bool
    """Keep optimizer state (and with stage 3 parameters) in host memory."""


StrategyConfig = Annotated[DDP | FSDP | DeepSpeed, Field(discriminator="name")]

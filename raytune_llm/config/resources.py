from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, section


@section
class Inline:
    """This process alone, without Ray: for tests, debugging and small jobs."""

    name: Literal["inline"]
    num_workers: Literal[1]


@section
class Local:
    """Ray workers on this machine."""

    name: Literal["local"]
    num_workers: PositiveInt | Literal["auto"]
    """auto: one for each GPU, or one."""
    cpus_per_worker: PositiveFloat | Literal["auto"]
    """auto: one beside a GPU; without GPUs, this machine's CPUs shared among the workers."""
    gpus_per_worker: NonNegativeFloat | Literal["auto"]
    """auto: one if there are any."""
    max_failures: NonNegativeInt
    """How often lost workers are replaced; the run then resumes from the newest checkpoint."""
    collective_timeout_s: PositiveFloat
    """A worker that waits longer than this for the others gives up, and one that doesn't answer for as long is replaced."""


@section
class Cluster:
    """Ray workers on the cluster at `address`."""

    name: Literal["cluster"]
    address: str | None
    """none: RAY_ADDRESS."""
    num_workers: PositiveInt | Literal["auto"]
    cpus_per_worker: PositiveFloat | Literal["auto"]
    gpus_per_worker: NonNegativeFloat | Literal["auto"]
    max_failures: NonNegativeInt
    preflight: Literal["full", "quick", "off"]
    """Where there are several nodes, they are asked before the run whether they are alike and see one storage; full: and how fast
    an all-reduce over them is, which takes as long as torch does to load."""
    collective_timeout_s: PositiveFloat


ResourcesConfig = Annotated[Inline | Local | Cluster, Field(discriminator="name")]

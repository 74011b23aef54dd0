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
    """auto: one per GPU worker; without GPUs, this machine's CPUs shared among the workers."""
    gpus_per_worker: NonNegativeFloat | Literal["auto"]
    """auto: one if there are any."""
    max_failures: NonNegativeInt
    """How often lost workers are replaced; the run then resumes from the newest checkpoint."""
    collective_timeout_s: PositiveFloat
    """A worker stops after waiting this long for the others; a worker that does not answer for this long is replaced."""


@section
class Cluster:
    """Ray workers on the cluster at `address`."""

    name: Literal["cluster"]
    address: str | None
    """null: RAY_ADDRESS."""
    num_workers: PositiveInt | Literal["auto"]
    cpus_per_worker: PositiveFloat | Literal["auto"]
    gpus_per_worker: NonNegativeFloat | Literal["auto"]
    max_failures: NonNegativeInt
    preflight: Literal["full", "quick", "off"]
    """Before a run on several nodes, check that their versions agree and that they share storage. full: also measure an
    all-reduce, which takes as long as importing torch."""
    collective_timeout_s: PositiveFloat


ResourcesConfig = Annotated[Inline | Local | Cluster, Field(discriminator="name")]

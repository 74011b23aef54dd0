from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, section

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # typing's own from Python 3.13 on

WorkerRange = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


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
    """How often within an hour lost workers are replaced; the run then resumes from the newest checkpoint."""
    collective_timeout_s: PositiveFloat
    """A worker stops after waiting this long for the others; a worker that does not answer for this long is replaced."""


@section
class Cluster:
    """Ray workers on the cluster at `address`."""

    name: Literal["cluster"]
    address: str | None
    """null: RAY_ADDRESS."""
    num_workers: PositiveInt | Literal["auto"] | WorkerRange
    """[fewest, most]: as many as the cluster has room for. The run shrinks when a node is lost, and grows when one joins."""
    cpus_per_worker: PositiveFloat | Literal["auto"]
    gpus_per_worker: NonNegativeFloat | Literal["auto"]
    max_failures: NonNegativeInt
    preflight: Literal["full", "quick", "off"]
    """Before a run on several nodes, check that their versions agree and that they share storage. full: also measure an
    all-reduce, which takes as long as importing torch."""
    collective_timeout_s: PositiveFloat


def uses_ray(resources: Inline | Local | Cluster) -> TypeIs[Local | Cluster]:
    """Whether workers are Ray's; without it, the run is this process."""
    return isinstance(resources, Local | Cluster)


def on_cluster(resources: Inline | Local | Cluster) -> TypeIs[Cluster]:
    """Whether workers may be on other machines than this one."""
    return isinstance(resources, Cluster)


def worker_counts(num_workers: int | str | list[int], micro_batches: int) -> list[int]:
    """The sizes that a group of workers may have, ascending: of a range those that share a step's micro-batches evenly. Empty:
    it is not known yet."""
    if isinstance(num_workers, str):
        return []
    fewest, most = num_workers if isinstance(num_workers, list) else (num_workers, num_workers)
    return [count for count in range(fewest, most + 1) if micro_batches % count == 0]


INLINE = Inline(name="inline", num_workers=1)
ResourcesConfig = Annotated[Inline | Local | Cluster, Field(discriminator="name")]

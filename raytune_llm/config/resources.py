from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, section

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # typing's own from Python 3.13 on

WorkerRange = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


@section
class Inline:
    """This process only, without Ray: for tests, debugging and small jobs."""

    name: Literal["inline"]
    num_workers: Literal[1]


@section
class Local:
    """Ray workers on this machine."""

    name: Literal["local"]
    num_workers: PositiveInt | Literal["auto"]
    """auto: one worker per GPU; one worker if there is no GPU."""
    cpus_per_worker: PositiveFloat | Literal["auto"]
    """auto: one per GPU worker; without GPUs, this machine's CPUs shared among the workers."""
    gpus_per_worker: NonNegativeFloat | Literal["auto"]
    """auto: one if this machine has GPUs."""
    max_failures: NonNegativeInt
    """How often within an hour lost workers may be replaced. Each time, the run resumes from the newest checkpoint."""
    collective_timeout_s: PositiveFloat
    """A worker stops after it has waited this long for the others. A worker, or another process of
    the command, that does not answer for this long is replaced."""


@section
class Cluster:
    """Ray workers on the cluster at `address`."""

    name: Literal["cluster"]
    address: str | None
    """The address of the Ray head, such as 10.0.0.1:6379. null: the environment's RAY_ADDRESS."""
    num_workers: PositiveInt | Literal["auto"] | WorkerRange
    """[fewest, most]: as many workers as the cluster has room for. The run shrinks when a node is lost and grows when one
    joins."""
    cpus_per_worker: PositiveFloat | Literal["auto"]
    gpus_per_worker: NonNegativeFloat | Literal["auto"]
    max_failures: NonNegativeInt
    preflight: Literal["full", "quick", "off"]
    """Checks before a run on several nodes. quick: the nodes have the same versions and share storage. full: also measure an
    all-reduce, which takes as long as importing torch."""
    collective_timeout_s: PositiveFloat


def uses_ray(resources: Inline | Local | Cluster) -> TypeIs[Local | Cluster]:
    """Whether the run uses Ray workers. If not, it runs in this process."""
    return isinstance(resources, Local | Cluster)


def on_cluster(resources: Inline | Local | Cluster) -> TypeIs[Cluster]:
    """Whether workers may run on other machines."""
    return isinstance(resources, Cluster)


def worker_counts(num_workers: int | str | list[int], micro_batches: int) -> list[int]:
    """The numbers of workers that a run may have, ascending. From a range, only those that divide a step's micro-batches evenly.
    Empty if the number is not known yet (auto)."""
    if isinstance(num_workers, str):
        return []
    fewest, most = num_workers if isinstance(num_workers, list) else (num_workers, num_workers)
    return [count for count in range(fewest, most + 1) if micro_batches % count == 0]


INLINE = Inline(name="inline", num_workers=1)
ResourcesConfig = Annotated[Inline | Local | Cluster, Field(discriminator="name")]

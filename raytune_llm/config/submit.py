from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raytune_llm.config.section import section
from raytune_llm.errors import ConfigError


@section
class JobServer:
    """How the jobs of a cluster are reached, and where their results go."""

    address: str | None
    """The URL of the head's dashboard: http://head:8265. null: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if it is a dashboard's
    address."""
    results: str
    """A folder here: the small results of a job (metrics, summary, curve, settings) come to `<results>/<job>/`."""

    def __post_init__(self) -> None:
        if self.address is not None and not self.address.startswith(("http://", "https://")):
            raise ConfigError(
                "submit.address",
                "must be the address of the cluster's dashboard",
                got=self.address,
                fix="For example, submit.address=http://head:8265.",
            )


@section
class SubmitConfig(JobServer):
    """What goes to the cluster with a run."""

    detach: bool
    """Return as soon as the cluster has the job; `jobs logs` comes back to it."""
    folder: str
    """Travels to the cluster and is the job's working folder, less what git ignores. This package goes with it."""
    ignore: list[str]
    """Names and paths in the folder that are not uploaded; * matches any part of a name, a slash at the end changes nothing."""
    max_mib: Annotated[int, Field(ge=1, le=500)]
    """The most that may travel. Ray's own limit is 512."""
    requirements: str | None
    """pinned: the versions that this machine has, of what the package depends on; or a requirements file. They are installed on
    each node where they differ. null: what the cluster has."""
    image: str | None
    """A container image that driver and workers run in, with all that they need; no folder travels then."""
    env: dict[str, str]
    """Variables of the job's environment. Who sees the cluster's dashboard sees them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is not None and self.requirements is not None:
            raise ConfigError(
                "submit.requirements",
                "can't be combined with submit.image, which has its own packages",
                got=self.requirements,
                fix="Remove one of them.",
            )

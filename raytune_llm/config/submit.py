from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raytune_llm.config.section import section
from raytune_llm.errors import ConfigError


@section
class JobServer:
    """How to reach the jobs of a cluster, and where their results go."""

    address: str | None
    """The URL of the head's dashboard, such as http://head:8265. null: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if that is the
    address of a dashboard."""
    results: str
    """A folder on this machine. The small results of a job (metrics, summary, curve, settings) are written to
    `<results>/<job>/`."""

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
    """What is sent to the cluster with a run."""

    detach: bool
    """Return as soon as the cluster has the job. `jobs logs` follows it later."""
    folder: str
    """The folder to upload, without what git ignores. It is the job's working folder. This package is uploaded with it."""
    ignore: list[str]
    """Names and paths in the folder that are not uploaded. * matches any part of a name; a slash at the end has no effect."""
    max_mib: Annotated[int, Field(ge=1, le=500)]
    """Maximum size of the upload in MiB. Ray's own limit is 512."""
    requirements: str | None
    """Packages to install on each node that has other versions. pinned: this package's dependencies in the versions of this
    machine; or the path of a requirements file. null: use what the cluster has."""
    image: str | None
    """A container image for driver and workers that has everything they need. No folder is uploaded then."""
    env: dict[str, str]
    """Environment variables of the job. Everybody who can open the cluster's dashboard can read them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is not None and self.requirements is not None:
            raise ConfigError(
                "submit.requirements",
                "can't be combined with submit.image, which has its own packages",
                got=self.requirements,
                fix="Remove one of them.",
            )

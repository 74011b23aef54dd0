from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

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
        if self.address is not None:
            check_address("submit.address", self.address)


def check_address(setting: str, address: str) -> None:
    """Raises ConfigError, which names the setting or the variable, for what is no URL with a host."""
    try:
        url = urlsplit(address)
        is_one = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        is_one = False
    if not is_one:
        rule, fix = "must be the address of the cluster's dashboard", f"For example, {setting}=http://head:8265."
        raise ConfigError(setting, rule, got=address, fix=fix)


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
        for name in self.env:
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):  # Ray would wait for a process that can't be started
                raise ConfigError("submit.env", "must have names of letters, digits and underscores", got=name)
        if self.image is not None and self.requirements is not None:
            raise ConfigError(
                "submit.requirements",
                "can't be combined with submit.image, which has its own packages",
                got=self.requirements,
                fix="Remove one of them.",
            )

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import section


@section
class NoTracking:
    name: Literal["none"]

    def in_group(self, group: str) -> NoTracking:
        return self


@section
class TensorBoard:
    name: Literal["tensorboard"]

    def in_group(self, group: str) -> TensorBoard:
        """Its files are in the runs' folders, which are in the sweep's folder."""
        return self


@section
class Tracker:
    """A service that takes a project and a run name."""

    name: Literal["wandb", "mlflow", "swanlab", "trackio"]
    project: str
    run: str | None
    """none: the run's `name`."""
    group: str | None
    """The name of a group of runs that belong together. null: for a sweep's trials, its `name`; else none."""

    def in_group(self, group: str) -> Tracker:
        return self if self.group is not None else replace(self, group=group)


TrackingConfig = Annotated[NoTracking | TensorBoard | Tracker, Field(discriminator="name")]

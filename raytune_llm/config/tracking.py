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
        """TensorBoard groups runs by folder, and a sweep's runs are in the sweep's folder."""
        return self


@section
class Tracker:
    """A service that takes a project and a run name."""

    name: Literal["wandb", "mlflow", "swanlab", "trackio"]
    project: str
    run: str | None
    """The run's name in the service; null: `name`."""
    group: str | None
    """The name of a group of runs. null: no group; for the trials of a sweep, the sweep's `name`."""

    def in_group(self, group: str) -> Tracker:
        return self if self.group is not None else replace(self, group=group)


TrackingConfig = Annotated[NoTracking | TensorBoard | Tracker, Field(discriminator="name")]

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import section


@section
class NoTracking:
    name: Literal["none"]


@section
class TensorBoard:
    name: Literal["tensorboard"]


@section
class Tracker:
    """A service that takes a project and a run name."""

    name: Literal["wandb", "mlflow", "swanlab", "trackio"]
    project: str
    run: str | None
    """none: the run's `name`."""


TrackingConfig = Annotated[NoTracking | TensorBoard | Tracker, Field(discriminator="name")]

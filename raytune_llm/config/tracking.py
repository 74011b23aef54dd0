from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import section


@section
class NoTracking:
    name: Literal["none"]
    one_a_process: ClassVar[bool] = False

    def of_trial(self, group: str, trial: str) -> NoTracking:
        return self


@section
class TensorBoard:
    name: Literal["tensorboard"]
    one_a_process: ClassVar[bool] = False

    def of_trial(self, group: str, trial: str) -> TensorBoard:
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

    @property
    def one_a_process(self) -> bool:
        """Whether its client has one run at a time."""
        return self.name == "swanlab"

    def of_trial(self, group: str, trial: str) -> Tracker:
        """A name that is given stands before the trial's: trials are runs of their own."""
        return replace(self, group=self.group or group, run=self.run and f"{self.run}_{trial}")


TrackingConfig = Annotated[NoTracking | TensorBoard | Tracker, Field(discriminator="name")]

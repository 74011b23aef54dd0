"""Trains a run where `resources` says: in this process, or in workers of Ray Train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from raytune_llm.config.resources import on_cluster, uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.models.quantization import check_device
from raytune_llm.report.metrics import Sink
from raytune_llm.report.updates import SampledAnswer, Update
from raytune_llm.runs.outcome import TrainOutcome
from raytune_llm.runs.ray_group import fit_on_ray
from raytune_llm.runs.worker import work
from raytune_llm.runs.workspace import Workspace


def fit(
    run: TrainRun,
    train_store: str,
    eval_store: str | None,
    *,
    sinks: Sequence[Sink] = (),
    on_update: Callable[[Update], None] = lambda update: None,
    on_samples: Callable[[Sequence[SampledAnswer]], None] = lambda samples: None,
    workspace: Workspace | None = None,
) -> TrainOutcome:
    """Train on the token stores in these folders. All callbacks are called in this process. workspace: see api.train."""
    if uses_ray(run.resources):
        return fit_on_ray(run, run.resources, train_store, eval_store, sinks=sinks, on_update=on_update, on_samples=on_samples)
    return work(
        run,
        train_store,
        eval_store,
        device=_device(),
        sinks=sinks,
        on_update=on_update,
        on_samples=on_samples,
        workspace=workspace,
    )


def check_devices(run: TrainRun) -> None:
    """Raises ConfigError if this machine's devices can't run the quantization. A cluster's workers check their own."""
    if not on_cluster(run.resources):
        check_device(run.quantization, _device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Experiment trackers (tracking=wandb and others), with one function each. A tracker is a sink for records (metrics.py).

A resumed run continues under the id that the service assigned to it, which is saved in the output folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.config.tracking import Tracker as Service
from raytune_llm.config.tracking import TrackingConfig
from raytune_llm.errors import ResourceError

RUN_ID = "tracking.json"
FILES = (RUN_ID, "tensorboard", "wandb", "mlflow.db", "swanlab")
"""Files and folders that trackers write to a run's output folder."""


@dataclass(frozen=True)
class TrackedRun:
    name: str
    output_dir: Path
    from_step: int
    """The step that the run resumes from; 0 for a new run."""
    settings: Mapping[str, Any]
    """The full config as plain values, which some services show."""


@dataclass(frozen=True)
class Tracker:
    """A sink that has to be closed."""

    send: Callable[[dict[str, float], int], object]
    """Called with (name -> value, step)."""
    close: Callable[[], object]

    def __call__(self, record: Mapping[str, Any]) -> None:
        numbers: dict[str, float] = {
            name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)
        }
        self.send(numbers, record["step"])


def open_tracker(tracking: TrackingConfig, run: TrackedRun) -> Tracker:
    """Raises ResourceError if the tracker's package is not installed."""
    return TRACKERS[tracking.name](tracking, run)


def check_tracker(tracking: TrackingConfig) -> None:
    """Raises ResourceError if the tracker's package is not installed, without importing it."""
    if TRACKERS[tracking.name] is not no_tracker and importlib.util.find_spec(tracking.name) is None:
        raise _missing(tracking.name)


def no_tracker(tracking: TrackingConfig, run: TrackedRun) -> Tracker:
    return Tracker(send=lambda numbers, step: None, close=lambda: None)


def tensorboard(tracking: TrackingConfig, run: TrackedRun) -> Tracker:
    """Event files in the output folder. Steps that are repeated after a resume replace the earlier ones."""
    writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter(
        str(run.output_dir / "tensorboard"), purge_step=run.from_step + 1
    )

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(send, writer.close)


def wandb(service: Service, run: TrackedRun) -> Tracker:
    """https://docs.wandb.ai/ref/python/init. W&B drops steps that are repeated after a resume; their values are identical."""
    tracked = _package("wandb").init(
        project=service.project,
        name=service.run or run.name,
        id=_earlier_id(service, run),
        resume="allow",
        reinit="create_new",  # not the run of another trial in this process
        dir=str(run.output_dir),
        config=dict(run.settings),
        **_group(service),
    )
    _keep_id(service, run, tracked.id)
    return Tracker(lambda numbers, step: tracked.log(numbers, step=step), tracked.finish)


def mlflow(service: Service, run: TrackedRun) -> Tracker:
    """https://mlflow.org/docs/latest/ml/tracking. The server is MLFLOW_TRACKING_URI; without one, a file in the output folder.

    MLflow accepts at most 6,000 characters per parameter and each parameter once. Steps that are repeated after a resume
    are there twice, with identical values. Its client has no active run, of which a process would have one only.
    """
    package = _package("mlflow")
    asked = package.is_tracking_uri_set()
    client = package.MlflowClient(None if asked else f"sqlite:///{(run.output_dir / 'mlflow.db').absolute()}")
    run_id = _earlier_id(service, run)
    if run_id is None:
        experiment = client.get_experiment_by_name(service.project)
        of_project = experiment.experiment_id if experiment else client.create_experiment(service.project)
        run_id = client.create_run(of_project, run_name=service.run or run.name, tags=_group(service)).info.run_id
        params = [package.entities.Param(name, str(value)[:6000]) for name, value in _by_path(run.settings)]
        for at in range(0, len(params), 100):  # as many as a request takes
            client.log_batch(run_id, params=params[at : at + 100])
    else:
        client.update_run(run_id, status="RUNNING")
    _keep_id(service, run, run_id)

    def send(numbers: dict[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [package.entities.Metric(name, value, now_ms, step) for name, value in numbers.items()]
        client.log_batch(run_id, metrics=metrics)

    return Tracker(send, partial(client.set_terminated, run_id))


def swanlab(service: Service, run: TrackedRun) -> Tracker:
    """https://docs.swanlab.cn/en/api/py-init.html"""
    earlier = _earlier_id(service, run)
    tracked = _package("swanlab").init(
        project=service.project,
        experiment_name=service.run or run.name,
        logdir=str(run.output_dir / "swanlab"),
        config=dict(run.settings),
        **_group(service),
        **({"id": earlier, "resume": "allow"} if earlier else {}),
    )
    _keep_id(service, run, tracked.id)
    return Tracker(lambda numbers, step: tracked.log(numbers, step=step), tracked.finish)


def trackio(service: Service, run: TrackedRun) -> Tracker:
    """https://huggingface.co/docs/trackio/api. It knows runs by their names."""
    tracked = _package("trackio").init(
        project=service.project,
        name=service.run or run.name,
        config=dict(run.settings),
        resume="allow" if run.from_step else "never",
        embed=False,
        **_group(service),
    )
    return Tracker(lambda numbers, step: tracked.log(numbers, step=step), tracked.finish)


TRACKERS: dict[str, Callable[[Any, TrackedRun], Tracker]] = {
    "none": no_tracker,
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "swanlab": swanlab,
    "trackio": trackio,
}


def _package(name: str, module: str | None = None) -> Any:
    try:
        return importlib.import_module(module or name)
    except ImportError:
        raise _missing(name) from None


def _missing(name: str) -> ResourceError:
    return ResourceError(
        f"tracking={name} needs the package {name}, which is not installed",
        f"Run `pip install {name}`, or choose another tracker, such as tracking=tensorboard.",
    )


def _group(service: Service) -> dict[str, str]:
    """The group as a tag, since MLflow has no groups."""
    return {} if service.group is None else {"group": service.group}


def _by_path(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _by_path(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _earlier_id(service: Service, run: TrackedRun) -> str | None:
    path = run.output_dir / RUN_ID
    if run.from_step == 0 or not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())
        return kept["id"] if (kept["name"], kept["project"]) == (service.name, service.project) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # a damaged file: the service gets a new run


def _keep_id(service: Service, run: TrackedRun, run_id: str) -> None:
    kept = {"name": service.name, "project": service.project, "id": run_id}
    write_atomically(run.output_dir / RUN_ID, json.dumps(kept))

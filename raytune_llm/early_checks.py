"""What a command refuses before it imports torch or Ray: models, rows and runs that are not there."""

from __future__ import annotations

from typing import Any

from raytune_llm import packaged
from raytune_llm.config.data import DataConfig
from raytune_llm.config.paths import expanded
from raytune_llm.config.run import ChatRun, EvaluateRun, ExportRun, PredictRun, PrepareRun, ServeRun, TrainRun


def check(run: Any) -> None:
    """Raises ConfigError or DataError. What a job of a cluster reads is looked for where the job runs."""
    if type(run) in (TrainRun, PrepareRun, ServeRun, ChatRun, PredictRun, ExportRun, EvaluateRun):
        packaged.check_models(run)
    if type(run) in (TrainRun, PrepareRun):
        _check_rows(run.data, run.stage.kind)
    if isinstance(run, ExportRun):
        _check_run(run.export.run, "export.run")
    if isinstance(run, PredictRun):
        _check_run(run.predict.run, "predict.run")
        _check_run(run.predict.judge, "predict.judge")


def _check_rows(data: DataConfig, kind: str) -> None:
    """Of a hub data set or an object store, nothing is asked yet, and of a folder only whether it is there."""
    from raytune_llm.data.kinds import KINDS
    from raytune_llm.data.readers.declarations import declared, declared_for_evaluation, source_of
    from raytune_llm.object_store import is_address

    ranked = KINDS[kind].ranked
    for one in (*declared(data, ranked=ranked), *declared_for_evaluation(data, ranked=ranked)):
        if not is_address(one.path) and not expanded(one.path).is_dir():
            source_of(one)


def _check_run(folder: str | None, setting: str) -> None:
    from raytune_llm.runs.trained import read_trained

    if folder is not None:
        read_trained(folder, setting)

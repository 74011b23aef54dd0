"""What a command refuses before it imports torch or Ray: models, rows and runs that are not there."""

from __future__ import annotations

import os
from typing import Any

from raytune_llm import packaged
from raytune_llm.adapter_folder import check_files
from raytune_llm.config.data import DataConfig
from raytune_llm.config.paths import expanded, value_of
from raytune_llm.config.resources import on_cluster
from raytune_llm.config.run import ChatRun, EvaluateRun, ExportRun, PredictRun, PrepareRun, ServeRun, TrainRun


def check(run: Any) -> None:
    """Raises ConfigError or DataError. What a job of a cluster reads is looked for where the job runs."""
    if type(run) in (TrainRun, PrepareRun, ServeRun, ChatRun, PredictRun, ExportRun, EvaluateRun):
        packaged.check_models(run)
        _check_adapters(run)
    if type(run) in (TrainRun, PrepareRun):
        _check_rows(run.data, run.stage.kind)
    if isinstance(run, ExportRun):
        _check_run(run.export.run, "export.run")
    if isinstance(run, PredictRun):
        _check_run(run.predict.run, "predict.run")
        _check_run(run.predict.judge, "predict.judge")


def _check_adapters(run: Any) -> None:
    """Whether folders of adapters exist, if they are read on this machine. What is in them is checked when they are read."""
    resources = value_of(run, "resources")
    if resources is not None and on_cluster(resources):
        return
    for setting in ("adapter.path", "model.merged_adapters", "serve.adapters", "predict.adapters", "export.adapters"):
        match value_of(run, setting):
            case str(folder):
                named = [(setting, folder)]
            case dict(folders):
                named = [(f"{setting}.{name}", folder) for name, folder in folders.items()]
            case folders:
                named = [(setting, folder) for folder in folders or ()]
        for name, folder in named:
            if not os.path.exists(expanded(folder)):  # False, too, for a path that is too long
                check_files(folder, name)


def _check_rows(data: DataConfig, kind: str) -> None:
    """Raises DataError if files or folders of rows are missing. Hub data sets, object stores and the content of folders are
    checked later, since that takes longer."""
    from raytune_llm.data.kinds import KINDS
    from raytune_llm.data.readers.declarations import declared, declared_for_evaluation, source_of
    from raytune_llm.object_store import is_address

    ranked = KINDS[kind].ranked
    for one in (*declared(data, ranked=ranked), *declared_for_evaluation(data, ranked=ranked)):
        if not is_address(one.path) and not os.path.isdir(expanded(one.path)):
            source_of(one)


def _check_run(folder: str | None, setting: str) -> None:
    from raytune_llm.runs.trained import read_trained

    if folder is not None:
        read_trained(folder, setting)

"""The files of a sweep: trials.csv, results.json, best.yaml, sweep.png, and the models of the best settings only."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.config.plain import as_text, to_yaml
from raytune_llm.tune.page import comparable, sweep_page
from raytune_llm.tune.study import BEST, PAGE, RESULTS, TABLE, Study
from raytune_llm.tune.trial import Trial


def write_results(study: Study) -> None:
    """Write the files from the trials so far."""
    folder = study.sweep.folder
    write_atomically(folder / TABLE, _table(study))
    write_atomically(folder / RESULTS, json.dumps(results(study), indent=2) + "\n")
    if study.ranked:
        write_atomically(folder / BEST, best_run(study))


def write_plots(study: Study) -> None:
    if comparable(study):
        sweep_page(study, study.sweep.folder / PAGE)


def results(study: Study) -> dict[str, Any]:
    """The content of results.json: `best` (settings, metric and folder of the best setting's first trial, or None), `trials`; of
    several metrics `metrics` and `pareto`, the settings of the front."""
    ranked = study.ranked
    best = None
    if ranked:
        first = ranked[0].trials[0]
        best = {"settings": dict(ranked[0].point), "metric": ranked[0].value, "folder": str(first.folder)}
    metrics = [{"name": metric.name, "mode": metric.mode} for metric in study.metric.all]
    names = [metric.name for metric in study.metric.all]
    front = [
        {
            "settings": dict(setting.point),
            "metrics": dict(zip(names, setting.values, strict=True)),
            "folder": str(setting.trials[0].folder),
        }
        for setting in study.front
    ]
    several = {"metrics": metrics, "pareto": front} if study.metric.others else {}
    return {"best": best, "metric": metrics[0], **several, "trials": [_plain(trial, study) for trial in study.trials]}


def best_run(study: Study) -> str:
    """The text of best.yaml, the config of the best setting. It trains with --config-dir SWEEP --config-name best, wherever that
    is typed."""
    sweep, best = study.sweep, study.ranked[0]
    run = with_absolute_paths(sweep.composed(best.point))
    folder = f"{sweep.folder.absolute()}_best"
    return to_yaml(replace(run, name=f"{run.name}_best", output_dir=folder, resume="auto"))  # resume is what the sweep does


def prune(study: Study) -> None:
    """Delete models and checkpoints of all trials but those of the best tune.keep settings, and of settings that may be among
    them yet: a seed is still to come, or a trial is tried again from its checkpoint."""
    kept = {trial.number for setting in study.ranked[: study.sweep.tune.keep] for trial in setting.trials}
    for trial in study.trials:
        if trial.number not in kept and study.is_over(trial):
            for name in ("checkpoints", "final"):
                shutil.rmtree(trial.folder / name, ignore_errors=True)


def _plain(trial: Trial, study: Study) -> dict[str, Any]:
    others = [metric.name for metric in study.metric.others]
    return {
        "trial": trial.number,
        "settings": dict(trial.point),
        "seed": trial.seed,
        "state": trial.state,
        "metric": trial.latest if trial.latest is not None and math.isfinite(trial.latest) else None,
        **dict(zip(others, trial.others or [None] * len(others), strict=True)),
        "step": trial.step,
        "steps": trial.total_steps,
        "seconds": round(trial.seconds, 1),
        "folder": str(trial.folder),
        "reason": trial.reason,
    }


def _table(study: Study) -> str:
    settings = study.sweep.names(trial.point for trial in study.trials)
    others = [metric.name for metric in study.metric.others]
    rest = ("seed", "state", "metric", *others, "step", "steps", "seconds", "folder", "reason")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", *settings, *rest])
    base = {name: study.sweep.base_value(name) for name in settings}
    for trial in study.trials:
        plain, values = _plain(trial, study), {**base, **trial.point}
        table.writerow([trial.number, *(_cell(values.get(name)) for name in settings), *(plain[name] for name in rest)])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """The value as it is typed on a command line."""
    return as_text(value) if isinstance(value, bool | list | dict) else value

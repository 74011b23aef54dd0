"""Compares runs: the settings that differ, their metrics, and their answers to the same rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_llm.config.paths import expanded
from raytune_llm.config.plain import flat_items, read_yaml
from raytune_llm.errors import ConfigError
from raytune_llm.report.metrics import METRICS, SAMPLES, SUMMARY

UNTOLD = ("name", "output_dir", "resume", "log_format")
"""Settings that are not compared, since they differ between any two runs."""
RUN = "run.yaml"
TRAINS = ("stage", "adapter")
"""Sections by which the run.yaml of a training run is recognized, since `evaluate` writes one too."""
DATA = tuple(f"data.{name}" for name in ("path", "eval_path", "dataset_info", "names", "split", "eval_split", "eval_fraction"))
"""Settings that, with train.seed, determine which row a row number means."""
OF_A_STEP = {"steps": "step", "loss_last": "loss", "tokens_per_s": "tokens_per_s"}
"""Name of a metric in a summary -> its name in the record of a step."""
MAX_SAMPLES = 3

Rows = Mapping[str, Sequence[Any]]
"""Name of a setting or metric -> the value of each run; None: the run does not have it."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    reference: str
    answers: Sequence[str | None]
    """The newest answer of each run."""


@dataclass(frozen=True)
class Comparison:
    names: Sequence[str]
    settings: Rows
    figures: Rows
    samples: Sequence[Sample]
    notices: Sequence[str]
    """Folders and files that were left out."""


@dataclass(frozen=True)
class _Run:
    place: Path
    settings: Mapping[str, Any]
    """Dotted path -> value."""
    summary: Mapping[str, Any]
    """Empty if the run has not ended."""


def compare(folders: Sequence[str]) -> Comparison:
    """Compare the runs in these folders. Folders without a run, and files that can't be read, are left out. Raises ConfigError if
    a folder does not exist, or if no run is left."""
    notices: list[str] = []
    places = {os.path.realpath(place): place for place in map(_place, folders)}.values()
    runs = [run for place in places if (run := _run(place, notices)) is not None]
    if not runs:
        rule = f"must have an output folder of a run, with its {RUN}"
        raise ConfigError("runs", rule, got=", ".join(folders), fix="; ".join(notices))
    settings = _rows([run.settings for run in runs])
    return Comparison(
        names=_names([run.place for run in runs]),
        settings={name: values for name, values in settings.items() if name not in UNTOLD and _differ(values)},
        figures=_rows([_figures(run) for run in runs]),
        samples=_samples(runs),
        notices=notices,
    )


def _run(place: Path, notices: list[str]) -> _Run | None:
    try:
        if not (place / RUN).is_file():
            notices.append(f"{place} is left out: it has no {RUN}")
            return None
    except OSError as error:  # another user's
        notices.append(f"{place} is left out: {error.strerror}")
        return None
    try:
        read = read_yaml(place / RUN, setting="runs")
    except ConfigError as error:
        notices.append(f"{place} is left out: its {RUN} {error.rule}")
        return None
    if not all(isinstance(read.get(section), dict) for section in TRAINS):
        notices.append(f"{place} is left out: its {RUN} is not one of a training run")
        return None
    summary = _object(place / SUMMARY)
    if summary is None and (place / SUMMARY).exists():
        notices.append(f"{place / SUMMARY} can't be read: its figures are left out")
    return _Run(place, dict(flat_items(read)), summary or {})


def _place(folder: str) -> Path:
    place = expanded(folder)
    if not os.path.lexists(place):  # a link that leads nowhere is no run
        raise ConfigError("runs", "must be output folders of runs", got=folder, fix="There is no such folder.")
    return place


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parent folders as are needed to tell them apart."""
    parts = [place.resolve().parts for place in places]
    count = [1] * len(parts)
    while True:
        names = ["/".join(one[-number:]) for one, number in zip(parts, count, strict=True)]
        equal = [n for n, name in enumerate(names) if names.count(name) > 1 and count[n] < len(parts[n])]
        if not equal:
            return names
        for n in equal:
            count[n] += 1


def _rows(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for one in found for name in one)
    return {name: [one.get(name) for one in found] for name in names}


def _differ(values: Sequence[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def _figures(run: _Run) -> dict[str, Any]:
    """The metrics of the summary and of the last evaluation, and worker hours. A run that has not ended has those of its last
    step, by the summary's names."""
    records = _lines(run.place / METRICS)
    step = next((record for record in reversed(records) if "loss" in record), {})
    evaluation = next((record for record in reversed(records) if "eval_loss" in record), {})
    so_far = {name: step[key] for name, key in OF_A_STEP.items() if key in step} if not run.summary else {}
    last = {"last eval at step": evaluation.get("step")} if evaluation else {}
    last |= {name: value for name, value in evaluation.items() if name.startswith("eval_")}
    known = {name: value for name, value in flat_items(run.summary) if value is not None}
    total, workers = known.get("wall_s.total"), known.get("world_size")
    hours = {}
    if isinstance(total, int | float) and isinstance(workers, int | float):
        hours = {"worker hours": total * workers / 3600}
    return {**so_far, **known, **last, **hours}


def _samples(runs: Sequence[_Run]) -> list[Sample]:
    """Answers to rows that all runs have answered."""
    newest = [{(one["source"], one["row"]): one for one in _lines(run.place / SAMPLES) if _is_sample(one)} for run in runs]
    same_data = not any(_differ([run.settings.get(name) for run in runs]) for name in (*DATA, "train.seed"))
    found = []
    for key, first in newest[0].items():
        if all(key in of_run and _same_row(first, of_run[key], same_data) for of_run in newest):
            found.append(Sample(first["prompt"], first["reference"], [of_run[key]["answer"] for of_run in newest]))
    return found[:MAX_SAMPLES]


def _is_sample(one: Mapping[str, Any]) -> bool:
    texts = (one.get(name) for name in ("source", "prompt", "reference", "answer"))
    return isinstance(one.get("row"), int) and all(isinstance(text, str) for text in texts)


def _same_row(one: Mapping[str, Any], other: Mapping[str, Any], same_data: bool) -> bool:
    """Whether two samples with the same source and row number are of the same row. If the runs have different data, the prompts
    must be equal too; with the same data they may differ, because of another chat template."""
    return one["reference"] == other["reference"] and (same_data or one["prompt"] == other["prompt"])


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing or holds something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. The last line may be incomplete, if a run is writing it."""
    found = []
    try:
        texts = path.read_text(errors="replace").splitlines() if path.is_file() else []
    except OSError:
        return []
    for line in texts:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [one for one in found if isinstance(one, dict)]

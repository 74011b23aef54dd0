"""Compares runs: the settings that differ, their metrics, and their answers to the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_llm.config.paths import expanded
from raytune_llm.config.plain import flat_items, read_yaml
from raytune_llm.errors import ConfigError
from raytune_llm.report.metrics import METRICS, SAMPLES, SUMMARY

UNTOLD = ("name", "output_dir", "resume", "log_format")
"""Settings that differ between any two runs."""
RUN = "run.yaml"
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


def compare(folders: Sequence[str]) -> Comparison:
    """Folders without a run are left out. Raises ConfigError for one that is not there, and where none is left."""
    given = [_place(folder) for folder in folders]
    places = [place for place in given if (place / RUN).is_file()]
    if not places:
        raise ConfigError("runs", f"must have an output folder of a run, with its {RUN}", got=", ".join(folders))
    runs = [dict(flat_items(read_yaml(place / RUN, setting="runs"))) for place in places]
    settings, summaries = _rows(runs), [_object(place / SUMMARY) for place in places]
    differing = {name: values for name, values in settings.items() if name not in UNTOLD and _differ(values)}
    return Comparison(
        names=_names(places),
        settings=differing,
        figures=_rows([_figures(place, summary or {}) for place, summary in zip(places, summaries, strict=True)]),
        samples=_samples(places),
        notices=[f"{place} is left out: it has no {RUN}" for place in given if place not in places]
        + [
            f"{place / SUMMARY} can't be read: its figures are left out"
            for place, summary in zip(places, summaries, strict=True)
            if summary is None and (place / SUMMARY).exists()
        ],
    )


def _place(folder: str) -> Path:
    place = expanded(folder)
    if not place.exists():
        raise ConfigError("runs", "must be output folders that are there", got=folder, fix="Leave it out.")
    return place


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' names, with parent folders if two are equal."""
    names = [place.resolve().name for place in places]
    return [
        name if names.count(name) == 1 else "/".join(place.resolve().parts[-2:])
        for name, place in zip(names, places, strict=True)
    ]


def _rows(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for one in found for name in one)
    return {name: [one.get(name) for one in found] for name in names}


def _differ(values: Sequence[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True) for value in values}) > 1


def _figures(place: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of the summary and of the last evaluation, and worker hours. A run that has not ended has only some."""
    evaluation = next((record for record in reversed(_lines(place / METRICS)) if "eval_loss" in record), {})
    last = {"last eval at step": evaluation.get("step")} if evaluation else {}
    last |= {name: value for name, value in evaluation.items() if name.startswith("eval_")}
    known = {name: value for name, value in flat_items(summary) if value is not None}
    total, workers = known.get("wall_s.total"), known.get("world_size")
    hours = {"worker hours": total * workers / 3600} if total is not None and workers is not None else {}
    return {**known, **last, **hours}


def _samples(places: Sequence[Path]) -> list[Sample]:
    """Answers to rows that all runs have answered."""
    newest = [{(one["source"], one["row"]): one for one in _lines(place / SAMPLES)} for place in places]
    common = [key for key in newest[0] if all(key in found for found in newest)] if newest else []
    return [
        Sample(newest[0][key]["prompt"], newest[0][key]["reference"], [found[key]["answer"] for found in newest])
        for key in common[:MAX_SAMPLES]
    ]


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, or no object in it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines; a run may be writing the last one."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return found

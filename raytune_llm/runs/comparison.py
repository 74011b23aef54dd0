"""Runs side by side: the settings that differ, the figures of each, and their answers to the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_llm.config.load import flat_items, read_yaml
from raytune_llm.errors import ConfigError
from raytune_llm.report.metrics import METRICS, SAMPLES, SUMMARY

UNTOLD = ("name", "output_dir", "resume", "log_format")
"""Settings that differ between any two runs."""
MAX_SAMPLES = 3

Rows = Mapping[str, Sequence[Any]]
"""By what is told, the value of each run; None where it has none."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    reference: str
    answers: Sequence[str | None]
    """Of each run, the newest."""


@dataclass(frozen=True)
class Comparison:
    names: Sequence[str]
    settings: Rows
    figures: Rows
    samples: Sequence[Sample]


def compare(folders: Sequence[str]) -> Comparison:
    """Raises ConfigError for a folder that is no run's."""
    places = [_place(folder) for folder in folders]
    runs = [dict(flat_items(read_yaml(place / "run.yaml", setting="runs"))) for place in places]
    settings = _rows(runs)
    differing = {name: values for name, values in settings.items() if name not in UNTOLD and _differ(values)}
    return Comparison(
        names=_names(places),
        settings=differing,
        figures=_rows([_figures(place) for place in places]),
        samples=_samples(places),
    )


def _place(folder: str) -> Path:
    place = Path(folder).expanduser()
    if not (place / "run.yaml").is_file():
        raise ConfigError("runs", "must be output folders of runs, with their run.yaml", got=folder, fix="Leave it out.")
    return place


def _names(places: Sequence[Path]) -> list[str]:
    """The folders', with those above them where two are alike."""
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


def _figures(place: Path) -> dict[str, Any]:
    """Of the summary, the last evaluation, and the hours of all its workers; of a run that hasn't ended, what there is."""
    summary = _json(place / SUMMARY) or {}
    evaluation = next((record for record in reversed(_lines(place / METRICS)) if "eval_loss" in record), {})
    last = {"last eval at step": evaluation.get("step")} if evaluation else {}
    last |= {name: value for name, value in evaluation.items() if name.startswith("eval_")}
    told = {name: value for name, value in flat_items(summary) if value is not None}
    total, workers = told.get("wall_s.total"), told.get("world_size")
    hours = {"worker hours": total * workers / 3600} if total is not None and workers is not None else {}
    return {**told, **last, **hours}


def _samples(places: Sequence[Path]) -> list[Sample]:
    """Of rows that all runs answered."""
    newest = [{(one["source"], one["row"]): one for one in _lines(place / SAMPLES)} for place in places]
    common = [key for key in newest[0] if all(key in found for found in newest)] if newest else []
    return [
        Sample(newest[0][key]["prompt"], newest[0][key]["reference"], [found[key]["answer"] for found in newest])
        for key in common[:MAX_SAMPLES]
    ]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole ones; a run may be writing the last."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found

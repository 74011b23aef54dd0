"""Writing the scores of several models with one protocol: results.json, a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.errors import ConfigError
from raytune_llm.report.metrics import non_finite_as_strings
from raytune_llm.report.plots import save

IN_TABLE = "in_table"


@dataclass(frozen=True)
class Score:
    value: float
    stderr: float | None
    """The standard error of the value; None if unknown."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Further entries for results.json."""
    in_table: bool = True

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Score:
        """Read an entry of results.json, which doesn't have IN_TABLE, or of SCORES, which does."""
        beside = {name: value for name, value in values.items() if name not in ("score", "stderr", IN_TABLE)}
        stderr = None if values["stderr"] is None else float(values["stderr"])
        return cls(float(values["score"]), stderr, beside, values.get(IN_TABLE, True))

    def to_json(self) -> dict[str, Any]:
        return {"score": self.value, "stderr": self.stderr, **self.beside}


TaskScores = Mapping[str, Mapping[str, Score]]
"""Task -> name of the score -> score, of one model."""
Scores = Mapping[str, TaskScores]
"""Model -> its scores."""


@dataclass(frozen=True)
class Shown:
    """How a protocol's scores are shown. A table never mixes scores of two protocols."""

    sentence: str
    """A sentence that names the protocol and explains the numbers."""
    unit: str
    """The unit on the plot's axes."""
    scale: float
    """The factor that converts scores to that unit."""
    digits: int
    main: str | None
    """The score in the plot; None: a task's first one."""


RESULTS, TABLE, PICTURE = "results.json", "results.md", "results.png"
MADE_FROM = "made_from"
SCORES = "scores.json"
"""The file with one model's scores, next to its answers. A repeated evaluation skips models that have it."""


def found_results(folder: Path, made_from: Mapping[str, Any]) -> Scores | None:
    """The scores of an earlier evaluation in the folder; None if there are none, or not all of them. Raises ConfigError if the
    folder holds an evaluation of other models, tasks or settings."""
    if not (folder / RESULTS).exists():
        return None
    try:
        found = json.loads((folder / RESULTS).read_text())
        then = dict(found[MADE_FROM])
        scores = {model: _scores(tasks) for model, tasks in found["models"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        then, scores = {}, None
    now = json.loads(json.dumps(made_from))
    if changed := [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]:
        how = f", of which this one differs in {', '.join(changed)}" if then else ""
        rule = f"must hold no results of an earlier evaluation{how}"
        raise ConfigError("output_dir", rule, got=str(folder), fix=f"Choose another one, or remove {RESULTS}.")
    return scores if all((folder / name).is_file() for name in (TABLE, PICTURE)) else None


def _scores(tasks: Mapping[str, Any]) -> TaskScores:
    return {task: {name: Score.from_json(one) for name, one in scores.items()} for task, scores in tasks.items()}


def found_scores(folder: Path, made_from: Mapping[str, Any]) -> tuple[Mapping[str, Any], TaskScores] | None:
    """(the protocol's entry in results.json, one model's scores), as write_scores wrote them; None if there are none with these
    settings and files."""
    try:
        found = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        if found[MADE_FROM] != json.loads(json.dumps(made_from)):
            return None
        return found["protocol"], _scores(found["scores"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def write_scores(folder: Path, protocol: Mapping[str, Any], made_from: Mapping[str, Any], scores: TaskScores) -> None:
    """Write the scores of a model that has answered everything."""
    plain = {
        task: {name: {**score.to_json(), IN_TABLE: score.in_table} for name, score in of_task.items()}
        for task, of_task in scores.items()
    }
    values = non_finite_as_strings({"protocol": protocol, "scores": plain, MADE_FROM: made_from})
    write_atomically(folder / SCORES, json.dumps(values, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def write_results(folder: Path, protocol: Mapping[str, Any], made_from: Mapping[str, Any], shown: Shown, scores: Scores) -> None:
    """protocol: what results.json says before the scores. made_from: all that the scores depend on. That file is written last."""
    models = {
        model: {task: {name: score.to_json() for name, score in of_task.items()} for task, of_task in of_model.items()}
        for model, of_model in scores.items()
    }
    (folder / TABLE).write_text(_table(shown, scores), encoding="utf-8")
    _plot(folder / PICTURE, shown, scores)
    values = non_finite_as_strings({**protocol, "models": models, MADE_FROM: made_from})
    text = json.dumps(values, indent=1, ensure_ascii=False, default=str, allow_nan=False)
    write_atomically(folder / RESULTS, text + "\n")


def _tasks(scores: Scores) -> Sequence[str]:
    return list(dict.fromkeys(task for of_model in scores.values() for task in of_model))


def _table(shown: Shown, scores: Scores) -> str:
    """One table per task, with a row per model and a column per score with its standard error."""
    lines = [shown.sentence, ""]
    for task in _tasks(scores):
        columns = list(dict.fromkeys(name for one in scores.values() for name in one[task] if one[task][name].in_table))
        lines += [f"| {task} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for model, of_model in scores.items():
            cells = [_cell(of_model[task].get(column), shown) for column in columns]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(score: Score | None, shown: Shown) -> str:
    if score is None:
        return ""
    error = "" if score.stderr is None else f" ± {shown.scale * score.stderr:.{shown.digits}f}"
    return f"{shown.scale * score.value:.{shown.digits}f}{error}"


ROW_INCHES, MAX_PIXELS = 24, 60_000
"""Width of a row of axes, unless one takes more; and of a side of the picture: a PNG of matplotlib has less than 2**16."""


def _plot(path: Path, shown: Shown, scores: Scores) -> None:
    """Plot one panel per task, since tasks may have different kinds of scores, with one bar per model and its standard error."""
    from matplotlib.figure import Figure  # half a second to import

    tasks = _tasks(scores)
    width = 1 + 0.6 * len(scores)
    columns = max(1, min(len(tasks), int(ROW_INCHES / width)))
    rows = max(1, -(-len(tasks) // columns))
    inches = (1 + columns * width, 3.2 * rows)
    figure = Figure(figsize=inches, dpi=min(200, MAX_PIXELS / max(inches)), layout="constrained")
    for axes, task in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, tasks):
        if task is None:
            axes.remove()
            continue
        name = shown.main or next(iter(next(iter(scores.values()))[task]))
        for place, of_model in enumerate(scores.values()):
            if (score := of_model[task].get(name)) is not None:
                axes.bar(place, shown.scale * score.value, yerr=shown.scale * (score.stderr or 0.0), capsize=3)
        axes.set_xticks(range(len(scores)), list(scores), rotation=20, ha="right")
        axes.set_title(task, fontsize=9)
        axes.set_ylabel(shown.unit if shown.main else name)
    save(figure, path)

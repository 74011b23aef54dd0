"""Scores of several models by one protocol: results.json, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.report.plots import save


@dataclass(frozen=True)
class Score:
    value: float
    stderr: float | None
    """The standard error of the value, where it is known."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What results.json says of it, too."""
    in_table: bool = True

    def to_json(self) -> dict[str, Any]:
        return {"score": self.value, "stderr": self.stderr, **self.beside}


TaskScores = Mapping[str, Mapping[str, Score]]
"""One model's, by task and by the name of the score."""
Scores = Mapping[str, TaskScores]
"""By model."""


@dataclass(frozen=True)
class Shown:
    """How a protocol's scores are shown. One table never holds scores of two protocols."""

    sentence: str
    """Names the protocol and says what the numbers are."""
    unit: str
    """Of the picture's axes."""
    scale: float
    """What scores are multiplied with to be in that unit."""
    digits: int
    main: str | None
    """The score in the picture; None: a task's first one."""


def write_results(folder: Path, protocol: Mapping[str, Any], shown: Shown, scores: Scores) -> None:
    """protocol: what results.json says before the scores. That file is written last."""
    models = {
        model: {task: {name: score.to_json() for name, score in of_task.items()} for task, of_task in of_model.items()}
        for model, of_model in scores.items()
    }
    (folder / "results.md").write_text(_table(shown, scores))
    _plot(folder / "results.png", shown, scores)
    text = json.dumps({**protocol, "models": models}, indent=1, ensure_ascii=False, default=str)
    write_atomically(folder / "results.json", text + "\n")


def _tasks(scores: Scores) -> Sequence[str]:
    return list(dict.fromkeys(task for of_model in scores.values() for task in of_model))


def _table(shown: Shown, scores: Scores) -> str:
    """A table a task: a row a model, a column a score with its standard error."""
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


def _plot(path: Path, shown: Shown, scores: Scores) -> None:
    """Axes a task, since tasks may have scores of different kinds; a bar a model, with its standard error."""
    from matplotlib.figure import Figure  # half a second to import

    tasks = _tasks(scores)
    figure = Figure(figsize=(1 + len(tasks) * (1 + 0.6 * len(scores)), 3.2), dpi=200, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        name = shown.main or next(iter(next(iter(scores.values()))[task]))
        for place, of_model in enumerate(scores.values()):
            if (score := of_model[task].get(name)) is not None:
                axes.bar(place, shown.scale * score.value, yerr=shown.scale * (score.stderr or 0.0), capsize=3)
        axes.set_xticks(range(len(scores)), list(scores), rotation=20, ha="right")
        axes.set_title(task, fontsize=9)
        axes.set_ylabel(shown.unit if shown.main else name)
    save(figure, path)

"""A page of pictures of a sweep: the curves of all trials, parallel coordinates, and the metric over each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raytune_llm.config.plain import as_text
from raytune_llm.config.space import Axis, Interval
from raytune_llm.report.plots import literal, save
from raytune_llm.tune.study import Study
from raytune_llm.tune.trial import Trial

INK, FAINT, BEST = "#333333", "#8a8a8a", "#d9622b"
LONGEST = 16
"""Letters of a value; of a longer one the middle is left out."""
LETTERS = {"panel": 40, "coordinates": 84}
"""As many as stand beside each other below a panel of one setting, and of all of them."""


def comparable(study: Study) -> list[Trial]:
    """Trials whose metric is a number so far."""
    return [trial for trial in study.trials if trial.latest is not None and math.isfinite(trial.latest)]


def sweep_page(study: Study, path: Path) -> None:
    """Write a PNG: two panels, and below them one per setting, three in a row. There must be trials that are comparable."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    axes = study.sweep.axes
    rows = -(-len(axes) // 3)
    figure = Figure(figsize=(12, 4.2 + 3 * rows), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1 + rows, 6, height_ratios=[4.2, *[3] * rows])
    trials = comparable(study)
    best = study.ranked[0].trials if study.ranked else ()
    colors = _colors(trials, study, colormaps["viridis"])
    _curves(figure.add_subplot(grid[0, :3]), trials, colors, best, study)
    _parallel(figure.add_subplot(grid[0, 3:]), trials, colors, best, study)
    for number, axis in enumerate(axes):
        column = 2 * (number % 3)
        _over(figure.add_subplot(grid[1 + number // 3, column : column + 2]), trials, colors, best, axis, study)
    title = f"{literal(study.sweep.run.name)}: {len(study.trials)} trials, {study.metric.name}"
    figure.suptitle(title, color=INK, x=0.01, ha="left")
    save(figure, path)


def _colors(trials: list[Trial], study: Study, map: Any) -> dict[int, Any]:
    """Trial number -> color by rank; the best is the darkest."""
    order = sorted(trials, key=study.score_of)
    return {trial.number: map(0.9 * place / max(len(order) - 1, 1)) for place, trial in enumerate(order)}


def _curves(axes: Any, trials: list[Trial], colors: dict[int, Any], best: Any, study: Study) -> None:
    from matplotlib.ticker import MaxNLocator

    for trial in sorted(trials, key=study.score_of, reverse=True):
        steps = sorted(trial.reports)
        chosen = trial in best
        style = {"color": BEST if chosen else colors[trial.number], "linewidth": 2.2 if chosen else 1.2}
        axes.plot(steps, [trial.reports[step] for step in steps], **style)
        if steps:
            mark = {"stopped": "x", "finished": "o"}.get(trial.state, ".")
            axes.plot(steps[-1], trial.reports[steps[-1]], mark, color=style["color"], markersize=5)
    values = [value for trial in trials for value in trial.reports.values() if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_title("each trial (x: stopped early)", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylabel(study.metric.name, color=INK)
    _quiet(axes)


def _parallel(axes: Any, trials: list[Trial], colors: dict[int, Any], best: Any, study: Study) -> None:
    """Parallel coordinates: one line per trial over the settings and the metric, each scaled to its range."""
    columns = list(study.sweep.axes)
    shown = [_shown(axis, study) for axis in columns]
    for trial in sorted(trials, key=study.score_of, reverse=True):
        values = (study.sweep.value_of(axis, trial.point) for axis in columns)
        places = [_place(axis, value, values_shown) for axis, value, values_shown in zip(columns, values, shown, strict=True)]
        heights = [*places, _scaled(trial.latest or 0.0, [one.latest or 0.0 for one in trials])]
        chosen = trial in best
        color, width = (BEST, 2.2) if chosen else (colors[trial.number], 1.0)
        axes.plot(range(len(heights)), heights, color=color, linewidth=width, alpha=1 if chosen else 0.7)
    values = [trial.latest or 0.0 for trial in trials]
    ends = [*((one[0], one[-1]) for one in shown), (min(values), max(values))]
    longest = max(4, min(LONGEST, LETTERS["coordinates"] // len(ends)))
    for column, (low, high) in enumerate(ends):
        axes.text(column, -0.04, _label(low, longest), ha="center", va="top", fontsize=8, color=FAINT)
        axes.text(column, 1.04, _label(high, longest), ha="center", va="bottom", fontsize=8, color=FAINT)
    names = [*(_short_name(axis) for axis in columns), study.metric.name]
    axes.set_xticks(range(len(names)), names, fontsize=9, color=INK, **_turned(names, "coordinates"))
    axes.tick_params(axis="x", pad=14, length=0)
    axes.set_yticks([])
    axes.set_ylim(-0.12, 1.12)
    for column in range(len(names)):
        axes.axvline(column, color="#dddddd", linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title("settings and metric, a line a trial", loc="left", fontsize=10, color=INK)


def _over(axes: Any, trials: list[Trial], colors: dict[int, Any], best: Any, axis: Axis, study: Study) -> None:
    from matplotlib.ticker import NullLocator

    shown = _shown(axis, study)
    for trial in trials:
        value = study.sweep.value_of(axis, trial.point)
        at = value if isinstance(axis.values, Interval) else _index(value, shown)
        if at is None:
            continue
        whole = trial.state == "finished"
        color = BEST if trial in best else colors[trial.number]
        axes.plot(at, trial.latest, "o" if whole else "x", color=color, markersize=6 if whole else 5)
    if isinstance(axis.values, Interval):
        if axis.values.log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            ticks = [axis.values.draw(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
            axes.set_xticks(ticks, [_text(tick) for tick in ticks])
    else:
        labels = [_label(value) for value in shown]
        axes.set_xticks(range(len(labels)), labels, **_turned(labels, "panel"))
        axes.set_xlim(-0.5, len(labels) - 0.5)
    share = importance(axis, trials, study)
    said = "" if share is None else f"  explains {share:.0%}"
    axes.set_title(f"{axis.name}{said}", loc="left", fontsize=10, color=INK)
    axes.set_ylabel(study.metric.name, color=INK)
    _quiet(axes)


def importance(axis: Axis, trials: list[Trial], study: Study) -> float | None:
    """The part of the variance of the trials' ranks that this setting alone explains: by group means for a list of values, by a
    parabola over (the logarithm of) an interval. A rough estimate, adjusted for the number of means or coefficients. None: there
    are too few trials."""
    known = [(study.sweep.value_of(axis, trial.point), study.score_of(trial)) for trial in trials]
    known = [(value, score) for value, score in known if axis.values.holds(value)]
    ranks = np.argsort(np.argsort([score for _, score in known])).astype(float)
    total = float(((ranks - ranks.mean()) ** 2).sum()) if len(ranks) else 0.0
    if isinstance(axis.values, Interval):
        places = np.array([_place(axis, value, []) for value, _ in known])
        free = len(known) - 3
        if free < 2 or total == 0 or np.ptp(places) == 0:
            return None
        left = ranks - np.polyval(np.polyfit(places, ranks, 2), places)
    else:
        groups = np.array([axis.values.values.index(value) for value, _ in known])
        free = len(known) - len(set(groups.tolist()))
        if free < 2 or total == 0 or len(set(groups.tolist())) < 2:
            return None
        left = ranks - np.array([ranks[groups == group].mean() for group in groups])
    adjusted = 1 - float((left**2).sum()) / free / (total / (len(known) - 1))
    return max(adjusted, 0.0)


def _place(axis: Axis, value: Any, shown: Sequence[Any]) -> float:
    """The value's place in the setting's range, or among those that are shown, from 0 to 1; NaN if it is outside."""
    values = axis.values
    if isinstance(values, Interval):
        if not values.holds(value):
            return math.nan
        if values.log:
            return math.log(value / values.low) / math.log(values.high / values.low)
        return (value - values.low) / (values.high - values.low)
    index = _index(value, shown)
    return math.nan if index is None else index / max(len(shown) - 1, 1)


def _index(value: Any, shown: Sequence[Any]) -> int | None:
    return shown.index(value) if value in shown else None


def _shown(axis: Axis, study: Study) -> list[Any]:
    """A list of values, with those that trials have beside it (the base's), or the ends of an interval, as a plot has them:
    numbers from the least on, others as they were given."""
    values: list[Any] = list(axis.values.ends)
    for trial in comparable(study) if not isinstance(axis.values, Interval) else ():
        value = study.sweep.value_of(axis, trial.point)
        if value is not None and value not in values:
            values.append(value)
    return sorted(values) if all(type(value) in (int, float) for value in values) else values


def _scaled(value: float, values: list[float]) -> float:
    low, high = min(values), max(values)
    return 0.5 if low == high else (value - low) / (high - low)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else as_text(value)


def _label(value: Any, longest: int = LONGEST) -> str:
    text = _text(value)
    end = (longest - 1) // 2
    return literal(text if len(text) <= longest else f"{text[: longest - 1 - end]}…{text[len(text) - end :]}")


def _turned(labels: Sequence[str], where: str) -> dict[str, Any]:
    """The rotation of labels: slanted if they would overlap."""
    slots = len(labels) * (max(map(len, labels)) + 2)
    return {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slots > LETTERS[where] + 2 else {}


def _short_name(axis: Axis) -> str:
    return ",".join(setting.rpartition(".")[2] for setting in axis.settings)


def _quiet(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color="#bbbbbb", labelcolor=INK, labelsize=9)

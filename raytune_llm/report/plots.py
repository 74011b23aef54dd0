"""Plots of a run: the loss curve, and a reward model's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, EVAL, INK, FAINT = "#2563a8", "#d9622b", "#333333", "#8a8a8a"


def loss_curve(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Plots training loss, raw and smoothed, eval loss, and the learning rate in a strip below. A PNG of 1600 x 1000 pixels."""
    # The import takes half a second and is needed once, at the end of a run, in one process.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    steps, losses = _series(records, "loss")
    eval_steps, eval_losses = _series(records, "eval_loss")
    lr_steps, rates = _series(records, "lr")

    if len(rates) > 1:
        axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[6, 1])
        strip.plot(lr_steps, rates, color=FAINT, linewidth=1.2)
        strip.set_ylim(0, max(rates.max(), 1e-12) * 1.15)
        strip.set_yticks([rates.max()], [f"{rates.max():.2g}"])
        strip.set_ylabel("lr", color=INK, rotation=0, ha="right", va="center")
        lowest = strip
        _style(strip)
    else:
        axes = lowest = figure.subplots()
    _style(axes)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)

    if len(losses):
        smooth = smoothed(losses, window=max(1, len(losses) // 12))
        axes.plot(steps, losses, color=TRAIN, linewidth=0.8, alpha=0.35)
        axes.plot(
            steps, smooth, color=TRAIN, linewidth=2, marker="o" if len(losses) == 1 else "", label=f"train  {smooth[-1]:.3g}"
        )
    if len(eval_losses):
        axes.plot(eval_steps, eval_losses, "o-", color=EVAL, linewidth=1, markersize=5, label=f"eval  {eval_losses[-1]:.3g}")
    if len(losses) or len(eval_losses):
        axes.legend(loc="upper right", labelcolor=INK, facecolor="white", edgecolor="none", framealpha=1)
    axes.set_title(literal(title), loc="left", color=INK, fontsize=12, pad=10)
    axes.set_ylabel("loss", color=INK)
    lowest.set_xlabel("step", color=INK)
    lowest.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    save(figure, path)


def score_scatter(chosen_P: Sequence[float], rejected_P: Sequence[float], path: Path) -> None:
    """Plots one point per pair: the rejected answer's score on x, the chosen one's on y. A PNG of 1200 x 1200 pixels.

    P: pairs. Points above the diagonal are ranked correctly.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), dpi=200, layout="constrained")
    axes = figure.subplots()
    chosen, rejected = np.array(chosen_P), np.array(rejected_P)
    right = chosen > rejected
    for which, color, name in ((right, TRAIN, "chosen is higher"), (~right, EVAL, "rejected is higher")):
        axes.scatter(rejected[which], chosen[which], s=14, color=color, alpha=0.6, linewidths=0, label=f"{name}  {which.sum()}")
    axes.axline((0, 0), slope=1, color=FAINT, linewidth=1)
    both = np.concatenate([chosen, rejected])
    margin = 0.05 * max(np.ptp(both), 1e-6)
    axes.set(xlim=(both.min() - margin, both.max() + margin), ylim=(both.min() - margin, both.max() + margin), aspect="equal")
    _style(axes)
    axes.legend(loc="lower right", labelcolor=INK, facecolor="white", edgecolor="none", framealpha=1)
    axes.set_title(f"held-out pairs: {right.mean():.0%} right", loc="left", color=INK, fontsize=12, pad=10)
    axes.set_xlabel("score of the rejected answer", color=INK)
    axes.set_ylabel("score of the chosen answer", color=INK)
    save(figure, path)


def literal(text: str) -> str:
    """The text with dollar signs escaped, since matplotlib reads what is between two of them as a formula."""
    return text.replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG to a temporary file and rename it, so that an earlier one is never left half overwritten."""
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    beside.replace(path)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The moving average over about `window` values around each one.

    Near the start the window shrinks on both sides, since values after a steep fall would flatten it. At the end the window has
    earlier values only, so that the curve doesn't end in a single value.
    """
    centers = np.arange(len(values))
    before = np.minimum(window // 2, centers)
    after = np.minimum(before, centers[::-1])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[centers + after + 1] - sums[centers - before]) / (before + after + 1)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records with a finite value of that name."""
    pairs = [(record["step"], record[name]) for record in records if np.isfinite(record.get(name, np.nan))]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.margins(x=0.01)
    axes.tick_params(color="#bbbbbb", labelcolor=INK, labelsize=9)

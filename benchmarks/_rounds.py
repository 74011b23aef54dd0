"""Cases that are measured several times, in rounds, so that a benchmark that ends early has something of each."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Figures = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser, *, runs: int) -> None:
    parser.add_argument("--runs", type=int, default=runs, help="of each case")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="no measurement begins after so many seconds")
    parser.add_argument("--kept", type=Path, help="a file of measurements: those of an earlier command count, new ones are added")


def measured(cases: Mapping[str, Callable[[], Figures]], asked: argparse.Namespace) -> dict[str, Any]:
    """The median of each figure of a case, how often it was measured (`runs`) and how often that failed (`failed`)."""
    began = time.monotonic()
    runs: dict[str, list[Figures]] = {name: [] for name in cases}
    failed = dict.fromkeys(cases, 0)
    for name, figures in _read(asked.kept):
        if name in runs:
            runs[name].append(figures)
    for number in range(asked.runs):
        for name, measure in cases.items():
            if len(runs[name]) > number or failed[name] or time.monotonic() - began > asked.limit_s:
                continue
            try:
                figures = measure()
            except Exception as error:
                failed[name] += 1
                print(f"{name} failed: {error}", file=sys.stderr)
                continue
            runs[name].append(figures)
            _append(asked.kept, name, figures)
            print(f"{name} {figures}, {time.monotonic() - began:.0f} s since the start", file=sys.stderr, flush=True)
    return {name: _medians(runs[name]) | ({"failed": failed[name]} if failed[name] else {}) for name in cases}


def _medians(runs: list[Figures]) -> dict[str, float]:
    return {figure: round(statistics.median(run[figure] for run in runs), 3) for figure in (runs or [{}])[0]} | {
        "runs": len(runs)
    }


def _read(kept: Path | None) -> list[tuple[str, Figures]]:
    if kept is None or not kept.exists():
        return []
    return [tuple(json.loads(line)) for line in kept.read_text().splitlines()]


def _append(kept: Path | None, name: str, figures: Figures) -> None:
    if kept is not None:
        with kept.open("a") as file:
            file.write(f"{json.dumps([name, figures])}\n")

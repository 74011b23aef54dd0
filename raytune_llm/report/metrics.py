"""What a run says about itself: metrics.jsonl while it trains, summary.json at its end.

A record is a flat mapping with `step` (counted from 1; 0 is an evaluation before the first) and, in this order where they apply:
epoch, loss, lr, grad_norm, tokens_seen, tokens_per_s, mfu, memory_gib, then the stage's own metrics. A record of an evaluation
holds eval_loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raytune_llm.atomic_file import write_atomically
from raytune_llm.errors import DataError

Record = Mapping[str, Any]
Sink = Callable[[Record], None]

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SAMPLES = "samples.jsonl"
TABLE, TRACE = "profile/table.txt", "profile/trace.json.gz"
"""Of train.profile."""
_NON_FINITE = {"NaN", "Infinity", "-Infinity"}


class JsonLines:
    """A file of JSON objects with a `step`, one a line, for one writer at a time."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """from_step is the last step that is in the checkpoint: later records are dropped, since those steps come again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line, record in _lines(path) if record["step"] <= from_step] if from_step and path.exists() else []
        write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(finite_or_named(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Report(JsonLines):
    """Appends records to metrics.jsonl and passes each on to the sinks; whoever opened a sink closes it. One a run, on rank 0."""

    def __init__(self, output_dir: Path, *, from_step: int, sinks: Sequence[Sink] = ()) -> None:
        super().__init__(output_dir / METRICS, from_step=from_step)
        self._sinks = tuple(sinks)

    def log(self, record: Record) -> None:
        """Values are numbers or strings; those that are None are left out."""
        known = {name: value for name, value in record.items() if value is not None}
        self.write(known)
        for sink in self._sinks:
            sink(known)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order. A last line that a crash cut short is left out; raises DataError for any other."""
    return [named_as_numbers(record) for _, record in _lines(path)]


@dataclass(frozen=True, kw_only=True)
class WallTime:
    """Seconds by phase. The phases don't overlap; total holds what lies between them as well."""

    start: float
    prepare: float
    load: float
    train: float
    save: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished run comes to. None where a thing was not measured or has no meaning here."""

    loss_first: float | None
    loss_last: float | None
    exact_match_before: float | None
    """Fractions, 0 to 1."""
    exact_match_after: float | None
    steps: int
    tokens: int
    tokens_per_s: float | None
    mfu: float | None
    peak_memory_gib: float | None
    world_size: int
    wall_s: WallTime


def summary_of(values: Mapping[str, Any]) -> Summary:
    """From the object in a summary.json."""
    return Summary(**{**named_as_numbers(values), "wall_s": WallTime(**values["wall_s"])})


def write_summary(path: Path, summary: Summary) -> None:
    write_atomically(path, json.dumps(finite_or_named(asdict(summary)), indent=2, allow_nan=False) + "\n")


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line, and the object in it."""
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    for number, text in enumerate(texts[:-1], start=1):
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if isinstance(record, dict) and "step" in record:
            lines.append((f"{text}\n", record))
        elif number < len(texts) - 1:
            raise DataError(f"{path}, row {number}", "is no JSON object", "Remove the line.")
    return lines


def named_as_numbers(record: Record) -> dict[str, Any]:
    """What `finite_or_named` made strings of, as numbers again."""
    return {name: float(value) if isinstance(value, str) and value in _NON_FINITE else value for name, value in record.items()}


def finite_or_named(values: Record) -> dict[str, Any]:
    """JSON has no NaN or infinity; as the strings "NaN", "Infinity" and "-Infinity" they stay readable to every parser."""
    return {
        name: finite_or_named(value)
        if isinstance(value, Mapping)
        else json.dumps(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }

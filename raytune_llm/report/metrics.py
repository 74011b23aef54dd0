"""The metrics files of a run: metrics.jsonl while it trains, summary.json at its end.

A record is a flat mapping with `step` (counted from 1; 0 is an evaluation before the first step) and, where they apply and in
this order: epoch, loss, lr, grad_norm, tokens_seen, tokens_per_s, mfu, memory_gib, then the metrics of the stage. A record of an
evaluation has eval_loss instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raytune_llm.atomic_file import write_atomically
from raytune_llm.errors import DataError, ResourceError
from raytune_llm.storage import patiently

Record = Mapping[str, Any]
Sink = Callable[[Record], None]

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SAMPLES = "samples.jsonl"
ADOPTED = "adopted.jsonl"
"""Records of another run from whose checkpoint this one resumed: a trial that took over or cloned another one."""
TABLE, TRACE = "profile/table.txt", "profile/trace.json.gz"
"""Files that train.profile writes."""
_NON_FINITE = {"NaN", "Infinity", "-Infinity"}


class JsonLines:
    """A file with one JSON object per line, each with a `step`, for one writer at a time."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """from_step: step of the checkpoint that the run resumes from. Later records are deleted, as those steps are repeated."""
        self._path, self._what = path, f"{path} can't be written"
        patiently(self._what, partial(self._begin, from_step))
        self._file = path.open("ab")
        self._size = path.stat().st_size

    def _begin(self, from_step: int) -> None:
        path = self._path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line, record in _lines(path) if record["step"] <= from_step] if from_step and path.exists() else []
        write_atomically(path, "".join(kept))

    def write(self, record: Record) -> None:
        line = json.dumps(non_finite_as_strings(record), allow_nan=False) + "\n"
        patiently(self._what, partial(self._append, line.encode()))

    def _append(self, line: bytes) -> None:
        """Write a line. After a failure the file is opened again, since a restarted file server may not know the old handle."""
        try:
            if self._file.closed:
                self._file = self._path.open("ab")
                self._file.truncate(self._size)  # a part of the line may be there
            if not self._path.exists():
                raise ResourceError(f"{self._path} was removed while the run wrote to it", "Repeat the command.")
            self._file.write(line)
            self._file.flush()
        except OSError:
            with suppress(OSError):
                self._file.close()
            raise
        self._size += len(line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Report(JsonLines):
    """Appends records to metrics.jsonl and passes them to the sinks, which it doesn't close. Used on rank 0 only."""

    def __init__(self, output_dir: Path, *, from_step: int, sinks: Sequence[Sink] = ()) -> None:
        super().__init__(output_dir / METRICS, from_step=from_step)
        self._sinks = tuple(sinks)

    def log(self, record: Record) -> None:
        """Values are numbers or strings; values of None are left out."""
        known = {name: value for name, value in record.items() if value is not None}
        self.write(known)
        for sink in self._sinks:
            sink(known)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order. An incomplete last line, left by a crash, is ignored; other bad lines raise
    DataError."""
    return [strings_as_non_finite(record) for _, record in _lines(path)]


def write_adopted(output_dir: Path, records: Sequence[Record]) -> None:
    """Store the records of the run from whose checkpoint this one resumes."""
    lines = [json.dumps(non_finite_as_strings(record), allow_nan=False) + "\n" for record in records]
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / ADOPTED, "".join(lines))


def history(output_dir: Path) -> list[dict[str, Any]]:
    """The records of everything that the run's model was trained on: those of another run up to the checkpoint from which this
    one resumed, then its own."""
    own, adopted = (read_metrics(path) if path.exists() else [] for path in (output_dir / METRICS, output_dir / ADOPTED))
    last = max((record["step"] for record in adopted), default=-1)
    return [*adopted, *(record for record in own if record["step"] > last)]


@dataclass(frozen=True, kw_only=True)
class WallTime:
    """Seconds of each phase of a run. Phases don't overlap; total includes the time between them."""

    start: float
    prepare: float
    load: float
    train: float
    save: float
    total: float
    evaluate: float = 0.0
    """Answering held-out rows before and after training (train.exact_match_rows)."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The results of a finished run, as in summary.json. None: not measured, or not defined for this run."""

    loss_first: float | None
    loss_last: float | None
    exact_match_before: float | None
    """Fraction of held-out rows, 0 to 1; the same for exact_match_after."""
    exact_match_after: float | None
    steps: int
    tokens: int
    tokens_per_s: float | None
    mfu: float | None
    peak_memory_gib: float | None
    world_size: int
    wall_s: WallTime


def summary_of(values: Mapping[str, Any]) -> Summary:
    """The Summary in the values of a summary.json."""
    return Summary(**{**strings_as_non_finite(values), "wall_s": WallTime(**values["wall_s"])})


def write_summary(path: Path, summary: Summary) -> None:
    write_atomically(path, json.dumps(non_finite_as_strings(asdict(summary)), indent=2, allow_nan=False) + "\n")


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each complete line, and the object in it."""
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    for number, text in enumerate(texts[:-1], start=1):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and "step" in record:
            lines.append((f"{text}\n", record))
        elif number < len(texts) - 1:
            raise DataError(f"{path}, row {number}", "is not a JSON object", "Remove the line.")
    return lines


def strings_as_non_finite(record: Record) -> dict[str, Any]:
    """The inverse of `non_finite_as_strings`."""
    return {name: float(value) if isinstance(value, str) and value in _NON_FINITE else value for name, value in record.items()}


def non_finite_as_strings(values: Record) -> dict[str, Any]:
    """NaN and infinities, which JSON doesn't have, as the strings "NaN", "Infinity" and "-Infinity"."""
    return {name: _finite_or_string(value) for name, value in values.items()}


def _finite_or_string(value: Any) -> Any:
    if isinstance(value, Mapping):
        return non_finite_as_strings(value)
    if isinstance(value, list | tuple):
        return [_finite_or_string(one) for one in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value

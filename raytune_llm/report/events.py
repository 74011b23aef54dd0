"""The progress of a run as JSON lines (log_format=json), for programs and for following a run from another machine.

An event is `{"event": kind, "time": seconds since 1970, ...}`. The kinds:
    run        name, text, and the full config as YAML (settings)
    rows       done and total, once all rows are prepared
    begin      total_steps, first_step, choices
    reference  done and total rows of the pass that computes reference log-probabilities
    notice     a line of text for the user, such as a slow task, what the run waits for, or a lost worker: with the last logged
               step, and ranks, if it is about workers
    step       a record of metrics.jsonl, with total_steps, and left_s (remaining seconds) once it can be estimated
    samples    generated answers to held-out rows
    done       the result of the run
    files      of a sweep: its small files when it ends, text by name
NaN and infinities are strings, as in metrics.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytune_llm.report.display import REFERENCE_EVERY_S, Display
from raytune_llm.report.metrics import non_finite_as_strings, strings_as_non_finite, summary_of
from raytune_llm.report.progress_bar import Pace
from raytune_llm.report.updates import Notice, ReferencePass, RunFinished, RunStarted, SampledAnswer, Update

ABOUT_TIME = ("time", "total_steps", "left_s", "rank")
"""Fields of a `step` event that are not in the record of metrics.jsonl."""

OF_ANOTHER_VERSION = (AttributeError, KeyError, TypeError, ValueError)
"""What reading an event raises whose fields are not those of this version: the job's package may be another one."""


class EventLog:
    """Writes the progress of one run as events. `Display` has the same methods."""

    def __init__(self, write: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self._write = write
        self._rows_written = False
        self._reference_at = 0.0
        self._pace: Pace | None = None
        self._step: int | None = None

    def run(self, name: str, text: str, settings: str) -> None:
        self._event("run", name=name, text=text, settings=settings)

    def rows(self, done: int, total: int) -> None:
        if not self._rows_written and done >= total:
            self._rows_written = True
            self._event("rows", done=done, total=total)

    def update(self, update: Update) -> None:
        match update:
            case RunStarted():
                self._pace = Pace(update.total_steps)
                self._step = update.first_step
                self._event("begin", **asdict(update))
            case Notice():
                about = {"step": self._step} if self._step is not None else {}
                self._event("notice", text=update.text, **about, **({"ranks": list(update.ranks)} if update.ranks else {}))
            case ReferencePass():
                now = time.monotonic()
                if update.done == 0 or now - self._reference_at >= REFERENCE_EVERY_S:
                    self._reference_at = now
                    self._event("reference", **asdict(update))

    def record(self, record: Mapping[str, Any]) -> None:
        assert self._pace is not None
        self._step = record["step"]
        left = self._pace.left_s(record["step"], time.monotonic())
        about = {"total_steps": self._pace.total_steps, "rank": 0}
        self._event("step", **record, **about, **({} if left is None else {"left_s": round(left, 1)}))

    def samples(self, samples: Sequence[SampledAnswer]) -> None:
        if samples:
            self._event("samples", samples=[sample.to_json() for sample in samples])

    def done(self, done: RunFinished) -> None:
        self._event("done", **asdict(done))

    def files(self, paths: Iterable[Path]) -> None:
        """Report the text of those files that exist."""
        self._event("files", files={path.name: path.read_text() for path in paths if path.is_file()})

    def close(self) -> None:
        pass

    def _event(self, kind: str, **values: Any) -> None:
        event = {"event": kind, "time": round(time.time(), 3), **non_finite_as_strings(values)}
        self._write(json.dumps(event, allow_nan=False, ensure_ascii=False))


def event_of(line: str) -> dict[str, Any] | None:
    """The event in a line of a log. None: the line is other output."""
    if not line.startswith('{"event"'):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and "time" in event else None


def record_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """The record of metrics.jsonl in a `step` event."""
    return strings_as_non_finite({name: value for name, value in event.items() if name not in ("event", *ABOUT_TIME)})


def show(event: Mapping[str, Any], display: Display) -> None:
    """Show an event as the run itself would show it. Kinds that this version doesn't know are ignored."""
    values = {name: value for name, value in event.items() if name not in ("event", "time")}
    match event["event"]:
        case "run":
            display.run(**values)
        case "rows":
            display.rows(**values)
        case "begin":
            display.update(RunStarted(**{**values, "choices": tuple(values["choices"])}))
        case "reference":
            display.update(ReferencePass(**values))
        case "notice":
            display.update(Notice(text=values["text"]))
        case "step":
            display.record(record_of(event), values.get("left_s"))
        case "samples":
            display.samples([SampledAnswer(**sample) for sample in values["samples"]])
        case "done":
            display.done(done_of(event))


def done_of(event: Mapping[str, Any]) -> RunFinished:
    values = {name: value for name, value in event.items() if name not in ("event", "time")}
    return RunFinished(**{**values, "summary": summary_of(values["summary"])})

"""A run as lines of JSON, one an event: for logs that programs read, and for whoever follows a run from another machine.

An event is `{"event": kind, "time": epoch seconds, ...}`. The kinds:
    run        name, text, and the whole run as YAML (settings)
    rows       done and total, once all are prepared
    begin      total_steps, first_step, choices
    reference  done and total rows of the reference's pass
    notice     a line for the user (text): what takes long, what a run waits for, what became of a worker
    step       a record of metrics.jsonl, with total_steps, and left_s where it can be told
    samples    answers to held-out rows
    done       what the run came to
Not a number and the infinities are the strings that metrics.jsonl has for them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from raytune_llm.report.display import REFERENCE_EVERY_S, Display
from raytune_llm.report.metrics import finite_or_named, named_as_numbers, summary_of
from raytune_llm.report.news import Begin, Done, Notice, ReferencePass, SampledAnswer
from raytune_llm.report.progress import Pace

ABOUT_TIME = ("time", "total_steps", "left_s", "rank")
"""What an event of a step has beside its record."""


class EventLog:
    """What Display shows, as events: it has the same methods."""

    def __init__(self, write: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self._write = write
        self._told_rows = False
        self._told_reference = 0.0
        self._pace: Pace | None = None

    def run(self, name: str, text: str, settings: str) -> None:
        self._tell("run", name=name, text=text, settings=settings)

    def rows(self, done: int, total: int) -> None:
        if not self._told_rows and done >= total:
            self._told_rows = True
            self._tell("rows", done=done, total=total)

    def begin(self, begin: Begin | ReferencePass | Notice) -> None:
        if isinstance(begin, Begin):
            self._pace = Pace(begin.total_steps)
            self._tell("begin", **asdict(begin))
        elif isinstance(begin, Notice):
            self._tell("notice", text=begin.text)
        elif begin.done == 0 or time.monotonic() - self._told_reference >= REFERENCE_EVERY_S:
            self._told_reference = time.monotonic()
            self._tell("reference", **asdict(begin))

    def record(self, record: Mapping[str, Any]) -> None:
        assert self._pace is not None
        left = self._pace.left_s(record["step"], time.monotonic())
        about = {"total_steps": self._pace.total_steps, "rank": 0}
        self._tell("step", **record, **about, **({} if left is None else {"left_s": round(left, 1)}))

    def samples(self, samples: Sequence[SampledAnswer]) -> None:
        if samples:
            self._tell("samples", samples=[sample.to_json() for sample in samples])

    def done(self, done: Done) -> None:
        self._tell("done", **asdict(done))

    def close(self) -> None:
        pass

    def _tell(self, kind: str, **values: Any) -> None:
        event = {"event": kind, "time": round(time.time(), 3), **finite_or_named(values)}
        self._write(json.dumps(event, allow_nan=False, ensure_ascii=False))


def event_of(line: str) -> dict[str, Any] | None:
    """The event of a line of a log; None where it is another program's line."""
    if not line.startswith('{"event"'):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "time" in event else None


def record_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """The record of metrics.jsonl that an event of a step holds."""
    return named_as_numbers({name: value for name, value in event.items() if name not in ("event", *ABOUT_TIME)})


def show(event: Mapping[str, Any], display: Display) -> None:
    """On a terminal, as the run itself would show it. Kinds of a later version are passed over."""
    values = {name: value for name, value in event.items() if name not in ("event", "time")}
    match event["event"]:
        case "run":
            display.run(**values)
        case "rows":
            display.rows(**values)
        case "begin":
            display.begin(Begin(**{**values, "choices": tuple(values["choices"])}))
        case "reference":
            display.begin(ReferencePass(**values))
        case "notice":
            display.begin(Notice(**values))
        case "step":
            display.record(record_of(event), values.get("left_s"))
        case "samples":
            display.samples([SampledAnswer(**sample) for sample in values["samples"]])
        case "done":
            display.done(done_of(event))


def done_of(event: Mapping[str, Any]) -> Done:
    values = {name: value for name, value in event.items() if name not in ("event", "time")}
    return Done(**{**values, "summary": summary_of(values["summary"])})

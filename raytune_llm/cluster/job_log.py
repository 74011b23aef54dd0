"""Reads the events in a job's log: the progress of the run, and the contents of its small output files."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_llm.report.events import OF_ANOTHER_VERSION, done_of, event_of, record_of
from raytune_llm.report.metrics import METRICS, SAMPLES, SUMMARY, JsonLines, write_summary
from raytune_llm.report.updates import RunFinished

CURVE, SETTINGS = "loss.png", "run.yaml"


@dataclass
class JobLog:
    """The state of a run, from the events read so far."""

    settings: str | None = None
    """The config as YAML."""
    step: int | None = None
    total_steps: int | None = None
    left_s: float | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    done: RunFinished | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Of a sweep: its small files, by name."""

    @property
    def loss(self) -> float | None:
        """The loss of the newest step that logged one."""
        return next((record["loss"] for record in reversed(self.records) if "loss" in record), None)

    def read(self, event: dict[str, Any]) -> None:
        """Raises one of OF_ANOTHER_VERSION, before anything changes, where a field is missing or of another type."""
        match event["event"]:
            case "run":
                self.settings = _text(event["settings"])
            case "begin":
                self.step, self.total_steps, self.left_s = int(event["first_step"]), int(event["total_steps"]), None
                self.records = [record for record in self.records if record["step"] <= event["first_step"]]
                self.samples = [sample for sample in self.samples if sample["step"] <= event["first_step"]]
            case "step":
                record = record_of(event)
                step, total, left = int(record["step"]), int(event["total_steps"]), event.get("left_s")
                float(record.get("loss", 0.0))
                self.step, self.total_steps, self.left_s = step, total, None if left is None else float(left)
                self.records.append(record)
            case "samples":
                self.samples += [{**sample, "step": int(sample["step"])} for sample in event["samples"]]
            case "files":
                self.files |= {Path(name).name: _text(text) for name, text in event["files"].items()}
            case "done":
                done = done_of(event)
                self.step, self.left_s = int(done.summary.steps), None
                self.done = done

    def write(self, folder: Path) -> list[str]:
        """Write the files of an output folder that the log has in full, and return their names. The log of a resumed run has only
        the steps of that run."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        if self.settings is not None:
            (folder / SETTINGS).write_text(self.settings)
            written.append(SETTINGS)
        for name, lines in ((METRICS, self.records), (SAMPLES, self.samples)):
            if lines:
                with JsonLines(folder / name, from_step=0) as file:
                    for line in lines:
                        file.write(line)
                written.append(name)
        if self.records:
            from raytune_llm.report.plots import loss_curve

            loss_curve(self.records, folder / CURVE, title=folder.name)
            written.append(CURVE)
        for name, text in self.files.items():
            (folder / name).write_text(text)
            written.append(name)
        if self.done is not None:
            write_summary(folder / SUMMARY, self.done.summary)
            written.append(SUMMARY)
        return written


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be text, got {value!r}")
    return value


def read(lines: Iterable[str]) -> JobLog:
    log = JobLog()
    for line in lines:
        event = event_of(line)
        if event is not None:
            with suppress(*OF_ANOTHER_VERSION):
                log.read(event)
    return log

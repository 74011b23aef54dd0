"""The log of a sweep: which trials began, what they reported, and how they ended, with one JSON object per line, in order.

It contains the whole state of a sweep, so a sweep that was killed at any moment is resumed from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from raytune_llm.errors import DataError

EVENTS = "events.jsonl"


class SweepLog:
    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS
        self._file: TextIO | None = None

    def read(self) -> list[dict[str, Any]]:
        """A last line that a crash cut short is ignored, and removed from the file when something is added."""
        events = [json.loads(line) for line in self._whole_lines()]
        for row, event in enumerate(events, start=1):
            if not isinstance(event, dict) or "event" not in event:
                raise self.damaged(row, "is no event")
        return events

    def damaged(self, row: int, how: str) -> DataError:
        """The error for a damaged row. A crash can only cut the last row, so something else changed the file."""
        return DataError(f"{self._path}, row {row}", how, "Restore the file, choose another output_dir, or set resume=never.")

    def append(self, event: Mapping[str, Any]) -> None:
        """Append an event. It is on the disk when this returns."""
        file = self._file = self._file or self._open()
        file.write(json.dumps(event) + "\n")
        file.flush()
        os.fsync(file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(len(line.encode()) + 1 for line in self._whole_lines())
        self._path.touch()
        os.truncate(self._path, size)
        return self._path.open("a", encoding="utf-8")

    def _whole_lines(self) -> list[str]:
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line)
            except (ValueError, RecursionError):
                raise self.damaged(number, "is no JSON object") from None
        return lines

"""Rows that can't be used or were shortened: the exceptions that say so, and counts by reason with three examples each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_EXAMPLES = 3
LEFT_OUT = "the row is longer than data.max_length"
"""The reason of rows that data.overlong=drop leaves out, which are not bad rows."""


class BadRow(Exception):
    """This row can't be used. `reason` is the same text for all rows with the same fault; `detail` is about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class RefusedRow(Exception):
    """A row that stops the whole run; the pipeline adds the file and the row's number and raises a DataError."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix


class TooLong(Exception):
    """The row has `length` tokens, more than data.max_length. Handled as data.overlong says (overlong.py)."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length


@dataclass
class Dropped:
    """Counts of rows by reason, with the first few examples of each as `file, row N: detail`."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def num_bad(self) -> int:
        """Bad rows, without those that data.overlong=drop leaves out."""
        return self.total - self.counts.get(LEFT_OUT, 0)

    def add(self, reason: str, detail: str, where: str) -> None:
        """where: `file, row N`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(f"{where}: {detail}" if detail else where)

    def merge(self, other: Dropped) -> None:
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples += other.examples[reason][: NUM_EXAMPLES - len(examples)]

    def is_of(self, file: str) -> bool:
        """Every example is a row of `file`: equal rows may have been read from a file elsewhere."""
        return all(example.startswith(f"{file}, row ") for examples in self.examples.values() for example in examples)

    def __str__(self) -> str:
        most_frequent_first = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return "; ".join(f"{count} x {reason} ({_in_brief(self.examples[reason])})" for reason, count in most_frequent_first)

    def to_json(self) -> dict[str, Any]:
        return {reason: {"rows": self.counts[reason], "examples": self.examples[reason]} for reason in sorted(self.counts)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Dropped:
        return cls(
            counts={reason: entry["rows"] for reason, entry in values.items()},
            examples={reason: list(entry["examples"]) for reason, entry in values.items()},
        )


def _in_brief(examples: Sequence[str]) -> str:
    """Examples with a file's name, and a detail that several share, only once."""
    rows: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        found = re.fullmatch(r"(.*?), row (\d+)(.*)", example, re.DOTALL)
        assert found is not None, "add got the file and the row"
        file, number, detail = found.groups()
        rows.setdefault((file, detail), []).append(number)
    return " | ".join(
        f"{file}, row{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}{detail}" for (file, detail), numbers in rows.items()
    )

"""Sources of raw rows, and the chunks that they are prepared in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_ROW_CHARS = 1 << 27
"""The longest element of a JSON array or field of a csv file: where its end is missing, the rest of the file is not read to the
last byte."""
MAX_CHUNKS = 1 << 14
"""Of more data, chunks are larger: a process has a memory map for each shard of a store, and Linux allows it 65,530."""
NumberedRow = tuple[int, Any]
"""The row's number and its columns by name, or the BadRow that says why there are none."""


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one type in order, or one hub data set."""

    kinds: tuple[str, ...]
    """Format of each file: a JSON file has an array or lines."""
    files: tuple[str, ...]
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    """The path of its files in a hub data set, if it is one."""
    hub: str = "huggingface"

    @property
    def kind(self) -> str:
        return self.kinds[0]

    @property
    def is_hub(self) -> bool:
        return self.kinds == ("hub",)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of one file, from `start` to `end`: bytes for text files, rows for parquet, arrow and hub data sets."""

    kind: str
    file: str
    start: int
    end: int
    first_row: int
    num_rows: int
    columns: tuple[str, ...] = ()
    """The header of a csv file, which only its first chunk has."""
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    hub: str = "huggingface"
    picks: tuple[int, ...] | None = None
    """Which of its rows are meant, counted from 0 and ascending; one that is there twice comes twice. None: all."""

    @property
    def num_picked(self) -> int:
        return self.num_rows if self.picks is None else len(self.picks)

"""Sources of raw rows, and the chunks that they are prepared in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_ROW_CHARS = 1 << 27
"""Maximum length of an element of a JSON array or a field of a csv file. Without a limit, one missing bracket or quote would read
the rest of the file into memory."""
MAX_CHUNKS = 1 << 14
"""Maximum number of chunks; larger data get larger chunks. Each shard of a store takes a memory map, and Linux allows a process
65,530 by default."""
NumberedRow = tuple[int, Any]
"""The row's number, and its columns by name or the BadRow that says why it can't be read."""


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one type in order, or one hub data set."""

    kinds: tuple[str, ...]
    """Format of each file: a JSON file has an array or lines."""
    files: tuple[str, ...]
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    """The folder of its files in a hub data set."""
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
    """The numbers of the rows to use, counted from 0 and ascending. A number that occurs twice gives the row twice. None: all."""

    @property
    def num_picked(self) -> int:
        return self.num_rows if self.picks is None else len(self.picks)

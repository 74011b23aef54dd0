"""File types: for each, a function that cuts a file into chunks and one that reads the rows of a chunk.

To add one, write its two functions in a file here, enter them below, and add its suffix to data/readers/sources.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from raytune_llm.data.readers.chunks import Chunk, NumberedRow, Source
from raytune_llm.data.readers.hubs import plan_hub, read_hub
from raytune_llm.data.readers.json_array import plan_json, read_json
from raytune_llm.data.readers.lines import plan_lines, read_json_lines, read_text_lines
from raytune_llm.data.readers.tables import plan_arrow, plan_csv, plan_parquet, read_arrow, read_csv, read_parquet

PLANNERS: dict[str, Callable[[Source, str, int], Iterator[Chunk]]] = {
    "json": plan_json,
    "lines": plan_lines,
    "text": plan_lines,
    "csv": plan_csv,
    "parquet": plan_parquet,
    "arrow": plan_arrow,
    "hub": plan_hub,
}
"""File type -> function of (source, one of its files, approximate bytes of a chunk) that yields the file's chunks in order. The
file of a hub data set is its id."""
READERS: dict[str, Callable[[Chunk, Collection[str] | None], Iterator[NumberedRow]]] = {
    "json": read_json,
    "lines": read_json_lines,
    "text": read_text_lines,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "hub": read_hub,
}

"""Files with one row per line: jsonl and txt. A row's number is its line number."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.readers import files
from raytune_llm.data.readers.chunks import Chunk, NumberedRow, Source


def plan_lines(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    with files.open_file(file) as stream:
        start = end = files.skip_bom(stream)
        first_line = line_number = 1
        num_rows = 0
        for line in stream:
            num_rows += not line.isspace()
            end += len(line)
            line_number += 1
            if end - start >= chunk_bytes:
                if num_rows:
                    yield Chunk(source.kind, file, start, end, first_line, num_rows)
                start, first_line, num_rows = end, line_number, 0
        if num_rows:
            yield Chunk(source.kind, file, start, end, first_line, num_rows)


def _numbered_lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    with files.open_file(chunk.file) as stream:
        stream.seek(chunk.start)
        number = chunk.first_row
        while stream.tell() < chunk.end:
            line = stream.readline()
            if not line.isspace():
                yield number, line
            number += 1


def read_json_lines(chunk: Chunk, wanted: Collection[str] | None) -> Iterator[NumberedRow]:
    for number, line in _numbered_lines(chunk):
        try:
            yield number, json.loads(line)
        except UnicodeDecodeError as error:  # before ValueError, of which it is a subclass
            yield number, BadRow("the line is not UTF-8", str(error))
        except (ValueError, RecursionError) as error:
            yield number, BadRow("the line is not valid JSON", str(error))


def read_text_lines(chunk: Chunk, wanted: Collection[str] | None) -> Iterator[NumberedRow]:
    for number, line in _numbered_lines(chunk):
        try:
            yield number, {"text": line.decode().rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield number, BadRow("the line is not UTF-8", str(error))

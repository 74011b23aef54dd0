"""Files with one JSON array of rows. They are read in pieces, so they may be of any size."""

from __future__ import annotations

import io
import json
import re
from codecs import getincrementaldecoder
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from raytune_llm.data.readers import files
from raytune_llm.data.readers.chunks import MAX_ROW_CHARS, Chunk, NumberedRow, Source
from raytune_llm.errors import DataError

READ_BYTES = 1 << 20
FIX = "Correct the file, or save it as jsonl."


class _JsonArray:
    """Iterates over the elements of a JSON array, and knows the byte at which each ends.

    The JSON decoder needs a whole element, so the buffer grows until the element at its start is complete.
    """

    _SPACE = re.compile(r"\s*")

    def __init__(self, stream: BinaryIO, file: str, first_row: int, *, after_another: bool = False) -> None:
        """after_another: the stream starts after an element, not at the opening bracket."""
        self.stream, self.file, self.row, self.after_another = stream, file, first_row, after_another
        self.bytes_passed = stream.tell()
        self.decode_utf8 = getincrementaldecoder("utf-8")()
        self.decode_json = json.JSONDecoder().raw_decode
        self.buffer, self.head, self.ended, self.closed = "", 0, False, False

    def __iter__(self) -> Iterator[Any]:
        while True:
            next_one = self._next_character()
            if next_one == "]":
                self.closed = True
                return
            if next_one and self.after_another:
                self._pass_comma(next_one)
                next_one = self._next_character()
            if not next_one:
                return
            if next_one == ",":
                raise DataError(f"{self.file}, row {self.row}", "is not valid JSON (a comma where a row should be)", FIX)
            yield self._element()
            self.after_another = True
            self.row += 1

    def is_last(self) -> bool:
        """Whether nothing but white space follows the closing bracket."""
        self.head += 1
        while not self.buffer[self.head :].strip():
            self.head = len(self.buffer)
            if not self._grow():
                return True
        return False

    def offset(self) -> int:
        """Bytes of the file up to the end of the element just yielded."""
        self._drop_passed()
        return self.bytes_passed

    def _next_character(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            match = self._SPACE.match(self.buffer, self.head)
            assert match is not None
            self.head = match.end()
            if self.head < len(self.buffer):
                return self.buffer[self.head]
            if not self._grow():
                return ""

    def _pass_comma(self, found: str) -> None:
        where = f"{self.file}, row {self.row}"
        if found != ",":
            raise DataError(where, "there is no comma between this row and the one before it", FIX)
        self.head += 1
        if self._next_character() == "]":
            raise DataError(where, "there is a comma after the last row", FIX)

    def _element(self) -> Any:
        while True:
            try:
                value, head = self.decode_json(self.buffer, self.head)
            except json.JSONDecodeError as error:
                if len(self.buffer) - self.head > MAX_ROW_CHARS:
                    problem = f"has no end within {MAX_ROW_CHARS:,} characters"
                    raise DataError(f"{self.file}, row {self.row}", problem, FIX) from None
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16
                if cut_off and self._grow():
                    continue
                problem = "the file ends in the middle of this row" if cut_off else f"is not valid JSON ({error.msg})"
                raise DataError(f"{self.file}, row {self.row}", problem, FIX) from None
            except (ValueError, RecursionError) as error:  # a number without end, brackets within brackets without end
                raise DataError(f"{self.file}, row {self.row}", f"can't be read ({error})", "Leave that row out.") from None
            if head == len(self.buffer) and not isinstance(value, dict | list | str) and self._grow():
                continue  # the rest of a number may follow
            self.head = head
            return value

    def _grow(self) -> bool:
        if self.ended:
            return False
        self._drop_passed()
        data = self.stream.read(max(READ_BYTES, len(self.buffer)))
        self.ended = not data
        try:
            self.buffer += self.decode_utf8.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.file}, row {self.row}", f"is not UTF-8 ({error.reason})", "Save the file as UTF-8.") from None
        return True

    def _drop_passed(self) -> None:
        self.bytes_passed += len(self.buffer[: self.head].encode())
        self.buffer, self.head = self.buffer[self.head :], 0


def plan_json(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    with files.open_file(file) as stream:
        files.skip_bom(stream)
        opening = stream.read(1)
        while opening.isspace():
            opening = stream.read(1)
        if not opening:
            return
        if opening != b"[":
            raise DataError(
                file, "must hold an array of rows, or one object a line", "Save the rows as a JSON array or as jsonl."
            )
        array = _JsonArray(stream, file, first_row=1)
        start, first_row, num_rows = stream.tell(), 1, 0
        for _ in array:
            num_rows += 1
            # A cheap lower bound first: the exact offset costs an encoding of what was passed.
            if stream.tell() - start >= chunk_bytes and (end := array.offset()) - start >= chunk_bytes:
                yield Chunk(source.kind, file, start, end, first_row, num_rows)
                start, first_row, num_rows = end, first_row + num_rows, 0
        if not array.closed:
            raise DataError(f"{file}, row {array.row}", "the file ends before the array's closing bracket", "Fetch it again.")
        end = array.offset()
        if not array.is_last():
            raise DataError(
                file, f"continues after the array's closing bracket (row {array.row - 1})", "Make it one array, or jsonl."
            )
        if num_rows:
            yield Chunk(source.kind, file, start, end, first_row, num_rows)


def read_json(chunk: Chunk, wanted: Collection[str] | None) -> Iterator[NumberedRow]:
    with files.open_file(chunk.file) as stream:
        stream.seek(chunk.start)
        part = io.BytesIO(stream.read(chunk.end - chunk.start))
    after_another = chunk.first_row > 1
    yield from enumerate(_JsonArray(part, chunk.file, chunk.first_row, after_another=after_another), chunk.first_row)

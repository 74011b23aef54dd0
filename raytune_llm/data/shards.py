"""Builds one shard of a store from one chunk of the source, on a worker.

Imports neither torch nor Ray. A recipe carries the tokenizer itself, so workers need no model folder and no hub.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from raytune_llm.data.dropped import BadRow, Dropped, RefusedRow, TooLong
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.kind import Kind, Targets
from raytune_llm.data.overlong import OVERLONG, Overlong
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.chunks import Chunk, NumberedRow
from raytune_llm.data.store import Shard, write_shard
from raytune_llm.data.templates.rendered import PlainText, Rendered, Renderer
from raytune_llm.data.tokens.tokenize import BlockTokenizer, Tokens
from raytune_llm.errors import DataError
from raytune_llm.records import Record

BLOCK_ROWS = 512
"""Rows per call of the tokenizer."""
MAX_ROW_CHARS = 1 << 25
"""A longer row, of some eight million tokens, is a broken file and would take gigabytes of memory."""


@dataclass(frozen=True)
class Recipe:
    """Everything needed to turn a raw row into tokens."""

    kind: str
    columns: tuple[str, ...]
    """The columns of a raw row that `convert` reads."""
    convert: Callable[[Any], Record]
    renderer: Renderer | PlainText
    tokenize: BlockTokenizer
    targets: Targets


@dataclass(frozen=True)
class Timed:
    """A shard that this run built, with the times of start and end in seconds since 1970."""

    shard: Shard
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class Shortened:
    """A row that was shortened to data.max_length."""

    row: Any
    how: str
    length: int
    """The number of tokens before it was shortened."""


@contextmanager
def without_collection() -> Iterator[None]:
    """Disables the garbage collector's search for cycles. Rows have none, and the repeated search takes an eighth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@without_collection()
def prepare_chunk(chunk: Chunk, recipe: Recipe, path: Path) -> Timed:
    """Read, convert, render, tokenize and write one chunk."""
    started = time.time()
    dropped, shortened = Dropped(), Dropped()
    rows: list[Any] = []
    numbered = sources.read(chunk, recipe.columns)
    while block := list(islice(numbered, BLOCK_ROWS)):
        for number, row in made_rows(block, recipe):
            match row:
                case BadRow(reason=reason, detail=detail):
                    dropped.add(reason, detail, sources.where(chunk, number))
                case RefusedRow():
                    raise DataError(sources.where(chunk, number), row.problem, row.fix)
                case Shortened():
                    rows.append(row.row)
                    shortened.add(row.how, f"{row.length} tokens", sources.where(chunk, number))
                case _:
                    rows.append(row)
    shard = write_shard(path, rows, dropped, kind=KINDS[recipe.kind], shortened=shortened)
    return Timed(shard, started, time.time())


def made_rows(block: list[NumberedRow], recipe: Recipe) -> Iterator[tuple[int, Any]]:
    """(row number, result) for each raw row: a row of the store, a Shortened one, BadRow or RefusedRow. Rows that can't be
    rendered come first."""
    kind = KINDS[recipe.kind]
    usable: list[tuple[int, Record, tuple[Rendered, ...]]] = []
    for number, row in block:
        try:
            if isinstance(row, BadRow):
                raise row
            record = recipe.convert(row)
            rendered = kind.render(record, recipe.renderer, recipe.targets)
            if (num_chars := sum(len(part.text) for part in rendered)) > MAX_ROW_CHARS:
                raise BadRow(f"the row is longer than {MAX_ROW_CHARS:,} characters", f"{num_chars:,}")
            for part in rendered:
                part.text.encode()
            usable.append((number, record, rendered))
        except UnicodeEncodeError as error:
            yield number, BadRow("a text holds a lone surrogate", repr(error.object[error.start]))
        except RecursionError:
            yield number, BadRow("values are nested too deeply")
        except (BadRow, RefusedRow) as bad:
            yield number, bad
    tokens = iter(recipe.tokenize([text for _, _, rendered in usable for text in rendered]))
    for number, record, rendered in usable:
        mine = list(islice(tokens, len(rendered)))
        try:
            yield number, _made(record, rendered, mine, kind, recipe)
        except (BadRow, RefusedRow) as bad:
            yield number, bad


def _made(record: Record, rendered: tuple[Rendered, ...], tokens: list[Tokens], kind: Kind, recipe: Recipe) -> Any:
    try:
        return kind.make(record, rendered, tokens, recipe.targets)
    except TooLong as long:
        row = Overlong(long.length, record, rendered, tokens, kind, recipe.targets, recipe.renderer, recipe.tokenize)
        made, how = OVERLONG[recipe.targets.overlong](row)
        return Shortened(made, how, long.length)


@lru_cache(maxsize=1)
def fetched(get: Callable[[Any], Recipe], reference: Any) -> Recipe:
    """The recipe of a reference to Ray's object store, unpickled once per process."""
    return get(reference)

"""One chunk of the source -> one shard of the store: what runs on a worker.

Imports neither torch nor Ray. A recipe carries the tokenizer itself, so workers need no model folder and no hub.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from raytune_llm.data import sources
from raytune_llm.data.dropped import BadRow, Dropped, RefusedRow
from raytune_llm.data.sources import Chunk
from raytune_llm.data.store import Shard, write_shard
from raytune_llm.data.templates import ChatTemplate, Rendered
from raytune_llm.data.tokenize import BlockTokenizer
from raytune_llm.errors import DataError
from raytune_llm.records import Conversation, Record, TokenRow

BLOCK_ROWS = 512
"""Rows that are tokenized by one call into Rust."""


@dataclass(frozen=True)
class Recipe:
    """All that turns a row into tokens."""

    convert: Callable[[Any], Record]
    template: ChatTemplate
    tokenize: BlockTokenizer
    max_length: int
    overlong: str


@dataclass(frozen=True)
class Timed:
    """A shard made by this run and when, in seconds of the machine's clock."""

    shard: Shard
    started: float
    ended: float


def prepare_chunk(chunk: Chunk, recipe: Recipe, path: Path) -> Timed:
    """Read, convert, render, tokenize and write one chunk."""
    started = time.time()
    dropped = Dropped()
    rows: list[TokenRow] = []
    numbered = sources.read(chunk)
    while block := list(islice(numbered, BLOCK_ROWS)):
        numbers: list[int] = []
        rendered: list[Rendered] = []
        for number, row in block:
            try:
                rendered.append(_render(row, recipe))
                numbers.append(number)
            except BadRow as bad:
                dropped.add(bad, sources.where(chunk, number))
            except RefusedRow as refused:
                raise DataError(sources.where(chunk, number), refused.problem, refused.remedy) from None
        tokenized = recipe.tokenize(rendered, max_length=recipe.max_length, overlong=recipe.overlong)
        for number, result in zip(numbers, tokenized, strict=True):
            if isinstance(result, TokenRow):
                rows.append(result)
            elif isinstance(result, BadRow):
                dropped.add(result, sources.where(chunk, number))
            else:
                raise DataError(sources.where(chunk, number), result.problem, result.remedy)
    shard = write_shard(path, rows, dropped)
    return Timed(shard, started, time.time())


def _render(row: Any, recipe: Recipe) -> Rendered:
    if isinstance(row, BadRow):
        raise row
    record = recipe.convert(row)
    assert isinstance(record, Conversation), "other records come with their stages"
    return recipe.template.render(record)


@lru_cache(maxsize=1)
def fetched(get: Callable[[Any], Recipe], reference: Any) -> Recipe:
    """The recipe behind a reference into Ray's object store, unpacked once a process."""
    return get(reference)

"""The rows on which an export is compared with its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import find_stores
from raytune_llm.data.samples import split_sources
from raytune_llm.data.store import Store
from raytune_llm.errors import UserError
from raytune_llm.runs.stores import held_out_part

MAX_TOKENS = 128
"""The most tokens of a row."""


@dataclass(frozen=True)
class Rows:
    ids: Sequence[np.ndarray]
    what: str


def rows_to_check(run: TrainRun | None, vocab_size: int, number: int) -> Rows:
    """The run's held-out rows, as far as their tokens are still there; else random tokens."""
    if run is not None:
        try:
            store, held_out = find_stores(run.model, run.data, kind=run.stage.kind)
        except (UserError, OSError):
            store = held_out = None
        if (folder := held_out or store) is not None:
            opened = Store.open(folder)
            part = 1.0 if held_out else held_out_part(run.data, opened)
            _, by_source = split_sources(opened, part, run.train.seed)
            chosen = list(islice(chain.from_iterable(rows.tolist() for rows in by_source.values()), number))
            what = "held-out rows of the run" if chosen else "rows that the run trained on"
            ids = [
                np.concatenate(opened.prompt_and_answer(row))[:MAX_TOKENS] for row in chosen or range(min(number, len(opened)))
            ]
            if ids := [row for row in ids if len(row) > 1]:
                return Rows(ids, f"{len(ids)} {what}")
    draw = np.random.default_rng(0)
    return Rows([draw.integers(0, vocab_size, MAX_TOKENS) for _ in range(number)], f"{number} rows of random tokens")

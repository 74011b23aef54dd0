"""The rows for comparing an export with its source, and for calibrating a quantized export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np

from raytune_llm.config.data import DataConfig
from raytune_llm.config.resources import INLINE
from raytune_llm.config.run import TrainRun
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.pipeline import find_stores, prepare
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.declarations import declared, source_of
from raytune_llm.data.samples import split_sources
from raytune_llm.data.store import Store
from raytune_llm.errors import ConfigError, UserError
from raytune_llm.export.source import Source
from raytune_llm.runs.stores import held_out_part
from raytune_llm.runs.trained import Trained

MAX_TOKENS = 128
"""The maximum length of a compared row."""
SEED = 0
"""The seed for splitting data.path into rows for comparing and rows for calibrating."""


@dataclass(frozen=True)
class Rows:
    ids: Sequence[np.ndarray]
    what: str


@dataclass(frozen=True)
class _Split:
    store: Store
    rows: Sequence[int]
    held_out: Store
    held_out_rows: Sequence[int]


def rows_to_check(source: Source, data: DataConfig, number: int) -> Rows:
    """Rows for comparing: of data.path if given, else the run's held-out rows if its token store still exists, else random
    tokens."""
    if _is_given(data):
        split = _split_data(source, data, number)
        return _read(
            split.held_out, split.held_out_rows, number, MAX_TOKENS, lambda count: f"{count} held-out rows of {data.path}"
        )
    run = source.run
    if run is not None:
        try:
            stores = [folder and Store.open(folder) for folder in find_stores(run.model, run.data, kind=run.stage.kind)]
            split = _split_run(run, *stores)
        except (UserError, OSError):
            split = None
        if split is not None:
            chosen = split.held_out_rows or range(min(number, len(split.store)))
            what = "held-out rows of the run" if split.held_out_rows else "rows that the run trained on"
            rows = _read(split.held_out, chosen, number, MAX_TOKENS, lambda count: f"{count} {what}")
            if rows.ids:
                return rows
    draw = np.random.default_rng(0)
    return Rows([draw.integers(0, source.vocab_size, MAX_TOKENS) for _ in range(number)], f"{number} rows of random tokens")


def rows_to_calibrate(source: Source, data: DataConfig, num_checked: int, number: int, max_tokens: int) -> Rows:
    """Rows for calibrating: of data.path if given, else of the run's training data, without the rows for comparing. Raises
    ConfigError if there are none, and DataError for a damaged data set."""
    run, what = source.run, "of what the run trained on"
    if _is_given(data):
        split, what = _split_data(source, data, num_checked), f"of {data.path}"
    elif run is not None:
        try:
            prepared = prepare(run.model, run.data, INLINE, kind=run.stage.kind)
            split = _split_run(run, prepared.store, prepared.eval_store)
        except UserError as error:
            raise _no_rows(f"those of the run can't be read ({error})") from error
    else:
        raise _no_rows("there is no run from which they could be taken")
    assert split is not None
    rows = _read(split.store, split.rows, number, max_tokens, lambda count: f"{count} rows {what}")
    if not rows.ids:
        raise _no_rows("none is left besides the rows with which the export is checked")
    return rows


def contents_of(data: DataConfig) -> list[str]:
    """The hashes of the given data sets."""
    if not _is_given(data):
        return []
    return [sources.fingerprint(source_of(one)) for one in declared(data, ranked=KINDS[data.format.row_kind].ranked)]


def _no_rows(why: str) -> ConfigError:
    fix = "Set data.path (and data.format), or export.format=w4a16, which needs none."
    return ConfigError("data.path", f"must name rows to calibrate with: {why}", got="null", fix=fix)


def _is_given(data: DataConfig) -> bool:
    return data.path is not None or data.dataset_info is not None


def _split_data(source: Source, data: DataConfig, num_held_out: int) -> _Split:
    """The rows of a data set that the run did not use. All of them are in one split."""
    model, kind = replace(source.model, path=str(source.beside or source.folder), revision=None), data.format.row_kind
    if source.run is not None:
        data = Trained(source.run, source.folder).rendered(data)
        model = source.run.model
    store = prepare(model, data, INLINE, kind=kind).store
    rows, held_out = split_sources(store, min(0.5, num_held_out / max(1, len(store))), SEED)
    return _Split(store, rows.tolist(), store, _joined(held_out))


def _split_run(run: TrainRun, trained: Store | None, evaluated: Store | None) -> _Split | None:
    """The rows of the run's training and evaluation stores; None if neither exists any more."""
    if trained is None:
        return None if evaluated is None else _Split(evaluated, (), evaluated, range(len(evaluated)))
    rows, held_out = split_sources(trained, held_out_part(run.data, trained), run.train.seed)
    if evaluated is not None:
        return _Split(trained, rows.tolist(), evaluated, range(len(evaluated)))
    return _Split(trained, rows.tolist(), trained, _joined(held_out))


def _joined(by_source: dict[str, np.ndarray]) -> list[int]:
    return list(chain.from_iterable(rows.tolist() for rows in by_source.values()))


def _read(store: Store, rows: Sequence[int], number: int, max_tokens: int, what: Callable[[int], str]) -> Rows:
    """At most `number` rows, truncated to their first tokens; rows of one token are left out."""
    cut: Iterator[np.ndarray] = (np.concatenate(store.prompt_and_answer(row))[:max_tokens] for row in islice(rows, number))
    ids = [row for row in cut if len(row) > 1]
    return Rows(ids, what(len(ids)))

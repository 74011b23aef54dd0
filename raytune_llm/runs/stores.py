"""The samples of a run from its token stores: train split, held-out split, and number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from raytune_llm.config.data import DataConfig
from raytune_llm.config.run import PrepareRun, TrainRun
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.mixture import mixed_rows
from raytune_llm.data.samples import Samples, split_sources
from raytune_llm.data.shared_stores import open_store
from raytune_llm.data.store import Store
from raytune_llm.data.streaming import Stream
from raytune_llm.errors import ConfigError, DataError
from raytune_llm.models.attention import shares_prefixes


@dataclass(frozen=True)
class Stores:
    train: Samples | Stream
    held_out: dict[str, Samples]
    """Data source -> samples; the name of a single source is ""."""
    evaluated: Store | None
    """The store of the held-out rows; None if there are none, or if the run streams."""
    manifests: dict[str, str]


def shares_prompts(run: TrainRun | PrepareRun, kind: str, model_config: Callable[[], PretrainedConfig]) -> bool:
    """Whether the prompt of a row is computed once for both of its answers (for kinds of rows with two answers)."""
    asked = run.data.share_prompts
    if asked is True and not KINDS[kind].can_share_prompts:
        raise ConfigError("data.share_prompts", f"can't be true for rows of {kind}", got=asked, fix="Set it to auto.")
    if asked is False or not KINDS[kind].can_share_prompts:
        return False
    config = model_config()
    possible = shares_prefixes(run.model.attention, config) and run.model.shift_attn_tokens is None
    if asked is True and not possible:
        raise ConfigError(
            "data.share_prompts",
            f"can't be true with model.attention={run.model.attention} and a {config.model_type} model: both must be "
            "able to attend to all earlier tokens, wherever they are",
            got=asked,
            fix="Set it to auto or false.",
        )
    return possible


def open_stores(
    run: TrainRun, train_store: str, eval_store: str | None, *, share_prompts: bool = False, in_lines: bool = False
) -> Stores:
    """The samples of both splits. in_lines: each document gets a row of the batch for itself."""
    settings = {"packing": run.data.packing, "share_prompts": share_prompts, "in_lines": in_lines}
    packed = partial(Samples, max_length=run.data.max_length, **settings)
    if run.data.streaming:
        train = Stream(Path(train_store), window_rows=run.data.streaming_buffer_rows, samples=packed)
        held_out, evaluated, manifests = {}, None, {"train": train.folder.name}
    else:
        store = evaluated = open_store(train_store)
        rows, held_out_rows = split_sources(store, held_out_part(run.data, store), run.train.seed)
        rows = mixed_rows(
            store,
            rows,
            strategy=run.data.mix,
            weights=run.data.mix_weights,
            temperature=run.data.mix_temperature,
            epochs=run.data.mix_epochs,
            seed=run.train.seed,
        )
        train = packed(store, rows)
        held_out = {name: packed(store, rows) for name, rows in held_out_rows.items()}
        manifests = {"train": store.manifest_hash}
    if eval_store is not None:
        evaluated = open_store(eval_store)
        _, held_out_rows = split_sources(evaluated, 1.0, run.train.seed)
        held_out = {name: packed(evaluated, rows) for name, rows in held_out_rows.items()}
        manifests["evaluation"] = evaluated.manifest_hash
    for what, samples in (("train", train), *((f"held-out {name}".strip(), samples) for name, samples in held_out.items())):
        if isinstance(samples, Samples) and not samples.counts.sum():
            raise _untrained(run, what)
    return Stores(train, held_out, evaluated, manifests)


def check_split(run: TrainRun, store: Store) -> None:
    """Raises UserError if holding out rows leaves none to train on. It is called before a run writes anything."""
    rows, held_out = split_sources(store, held_out_part(run.data, store), run.train.seed)
    if not len(rows):
        setting, got = (
            ("data.eval_rows", run.data.eval_rows) if run.data.eval_rows else ("data.eval_fraction", run.data.eval_fraction)
        )
        raise ConfigError(setting, f"must leave rows to train on, of which there are {len(store)}", got=got, fix="Lower it.")
    if store.kind.end_to_end and run.data.packing:
        return
    for what, numbers in (("train", rows), *((f"held-out {name}".strip(), numbers) for name, numbers in held_out.items())):
        if not store.counts[numbers].sum():
            raise _untrained(run, what)


def _untrained(run: TrainRun, what: str) -> DataError:
    return DataError(str(run.data.path), f"the {what} rows have no trained token", "Check data.format and the answers.")


def held_out_part(data: DataConfig, store: Store) -> float | Mapping[str, float]:
    """The fraction of the store's rows to hold out, or source -> fraction."""
    if data.eval_rows is None:
        return data.eval_fraction
    if data.eval_rows >= len(store):
        raise ConfigError(
            "data.eval_rows", f"must leave rows to train on, of which there are {len(store)}", got=data.eval_rows, fix="Lower it."
        )
    return data.eval_rows / len(store)


def total_steps(run: TrainRun, steps_per_epoch: int | None) -> int:
    """The number of steps of a run. steps_per_epoch: None for a stream, which is repeated until train.max_steps."""
    if steps_per_epoch is None:
        assert run.train.max_steps is not None
        return run.train.max_steps
    steps = math.ceil(round(run.train.epochs * steps_per_epoch, 6))  # 1.1 * 10 is 11.000000000000002
    return steps if run.train.max_steps is None else min(steps, run.train.max_steps)

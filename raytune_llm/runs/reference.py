"""The reference model of a run (the policy before its first step, or another model), and where its log-probabilities come from.

precomputed: one pass over the rows, by the run's own workers, with the model that they are about to train. So the reference
includes an adapter that the run continues, and no second model is needed. The table is stored beside the token store under a key
of everything that determines its numbers, and later runs read it by row.

online: the same model in each step, with its trained weights as they were at the start. Another model (stage.reference_model,
stage.reference_adapter) is loaded in addition, unsharded and frozen, for the pass or for the whole run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from raytune_llm import packaged
from raytune_llm.config.adapter import NoAdapter, SavedAdapter
from raytune_llm.config.run import TrainRun
from raytune_llm.config.section import settings_of
from raytune_llm.data.samples import Samples
from raytune_llm.data.store import Store
from raytune_llm.errors import DataError
from raytune_llm.file_hash import sha256_of
from raytune_llm.models.build import UNQUANTIZED, build_policy, compute_dtype
from raytune_llm.models.load import load_config
from raytune_llm.runs.stores import Stores
from raytune_llm.stages import AnswerLogprobs
from raytune_llm.train.enrichers import Enricher
from raytune_llm.train.enrichers.online_reference import OnlineReference
from raytune_llm.train.enrichers.reference_table import OnRows, ReferenceTable, ReferenceTables, precomputed
from raytune_llm.train.strategies.base import Strategy

TABLE_VERSION = 3
"""A part of the key. Increase it when a change of the code changes the numbers."""


class Reference(NamedTuple):
    enricher: Enricher
    choices: tuple[str, ...]
    """Automatic choices and their reasons, one line each."""


def find_reference(
    run: TrainRun,
    logps: AnswerLogprobs,
    strategy: Strategy,
    stores: Stores,
    config: PretrainedConfig,
    *,
    first_pieces: Mapping[int, Sequence[int]],
    device: torch.device,
    compute: torch.dtype,
    pad_id: int,
    on_rows: OnRows,
) -> Reference:
    """The reference of a run. Call it before weights are restored from a checkpoint, since the initial weights are the reference,
    unless another model is named. first_pieces: see Builder.
    """
    other = _other_model(run, config, first_pieces, device)
    as_found = strategy.reference if other is None else nullcontext
    if run.stage.reference == "online":
        if other is None:
            strategy.module.keep_as_found()
        return Reference(OnlineReference(logps, as_found, other), ("reference: in each step",))
    tables: dict[str, ReferenceTable] = {}
    choices = []
    assert isinstance(stores.train, Samples), "config/rules.py lets a stream's reference be online only"
    samples = [stores.train, *stores.held_out.values()]
    for store in {id(one.store): one.store for one in samples}.values():
        assert isinstance(store, Store)
        of_store = [one for one in samples if one.store is store]
        if not store.kind.has_partners:
            of_store = [of_store[0].over(np.arange(len(store)))]
        with as_found():
            tables[store.manifest_hash], where = precomputed(
                other or strategy.model,
                logps,
                of_store,
                store.place.rpartition("/")[0],
                _key_of(run, logps, of_store, store.manifest_hash, compute),
                micro_batch_size=run.train.micro_batch_size,
                pad_id=pad_id,
                device=device,
                compute=compute,
                on_rows=on_rows,
            )
        choices.append(f"reference: {where}")
    return Reference(ReferenceTables(tables), tuple(choices))


def _other_model(
    run: TrainRun, config: PretrainedConfig, first_pieces: Mapping[int, Sequence[int]], device: torch.device
) -> nn.Module | None:
    """The frozen model of stage.reference_model and stage.reference_adapter, unsharded on this worker."""
    path, adapter = run.stage.reference_model, run.stage.reference_adapter
    if path is None and adapter is None:
        return None
    section = run.model if path is None else replace(run.model, path=path, weights="pretrained", config={}, merged_adapters=[])
    found = config if path is None else load_config(path, {}, trust_remote_code=run.model.trust_remote_code)
    if found.get_text_config().vocab_size != config.get_text_config().vocab_size:
        raise DataError(str(path), "is a reference with another vocabulary than the model's", "Choose one of the same family.")
    compute = compute_dtype(run.train.precision, device)
    model, _ = build_policy(
        found,
        section,
        NoAdapter(name="none") if adapter is None else SavedAdapter(path=adapter, setting="stage.reference_adapter"),
        compute=compute,
        seed=run.train.seed,
        device=device,
        training=None,
        quantization=UNQUANTIZED if adapter is None else run.quantization,
        first_pieces=first_pieces,
    )
    return model.requires_grad_(False).to(device).eval()


# What decides the numbers of a table ----------------------------------------------------------------------------------


def _key_of(
    run: TrainRun, logps: AnswerLogprobs, samples: Sequence[Samples], manifest_hash: str, compute: torch.dtype
) -> dict[str, Any]:
    """As a JSON object."""
    assert isinstance(logps, partial)
    other = run.stage.reference_model is not None or run.stage.reference_adapter is not None
    adapter = run.stage.reference_adapter if other else run.adapter.path
    stage_model = run.stage.reference_model
    model = stage_model or run.model.path
    seed = run.train.seed if run.model.weights == "random" and run.stage.reference_model is None else None
    return {
        "version": TABLE_VERSION,
        "model": [
            model and _files(packaged.resolve(model)),
            run.model.config,
            *([] if run.model.positions is None else [run.model.positions, run.model.rope_scaling]),
            run.model.revision,
            seed,
        ],
        "merged": [_files(folder, content=True) for folder in ([] if stage_model else run.model.merged_adapters)],
        "adapter": _files(adapter, content=True) if adapter else None if other else _beginning(run),
        "computed": [str(compute), run.quantization.name, *settings_of(run.quantization).values()],
        "formula": [logps.func.__name__, logps.keywords],
        "data": [manifest_hash, run.data.max_length, [_rows(one) for one in samples]],
    }


def _beginning(run: TrainRun) -> list[Any] | None:
    """Everything that determines a new adapter's initial values, if the policy then differs from the base; else None."""
    if run.adapter.trains_base or run.adapter.starts_at_base:
        return None
    return [run.adapter.name, *settings_of(run.adapter).values(), run.train.seed, run.train.adapter_seed]


def _files(path: str, *, content: bool = False) -> Any:
    """A fingerprint of a model's folder, with weights by size and modification time, or by content. A hub id is its own
    fingerprint."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    weights = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))
    files = [*weights, *folder.glob("*config.json")]
    if content:
        return {file.name: sha256_of(file) for file in files}
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _rows(samples: Samples) -> str | None:
    """A hash of the rows if the samples don't have all rows of the store, since a row's partner depends on the rows and their
    order; else None."""
    if not samples.store.kind.has_partners:
        return None
    return hashlib.sha256(np.asarray(samples.rows, np.int64).tobytes()).hexdigest()

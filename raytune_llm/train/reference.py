"""Log-probabilities of answers under the reference: what the run found, before its first step, or another model.

precomputed: one pass over the rows, by the run's own workers with the model that they are about to train, however it is spread.
What an adapter that the run goes on from has learnt is part of the reference so, and no second model is needed. The table stands
beside the token store, under a key of all that decides its numbers, and later runs read it by row.

online: the same model in each step, with its trained weights as they were. Another model (stage.reference_model,
stage.reference_adapter) is loaded beside the policy, whole and frozen: for the pass, or for the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig

from raytune_llm.config.adapter import NoAdapter, SavedAdapter
from raytune_llm.config.run import TrainRun
from raytune_llm.config.stage import DPO, KTO
from raytune_llm.data.loader import Samples
from raytune_llm.data.store import Store
from raytune_llm.data.streaming import Stream
from raytune_llm.errors import DataError
from raytune_llm.models.load import load_config
from raytune_llm.models.policy import UNQUANTIZED, build_policy, compute_dtype
from raytune_llm.stages import AnswerLogprobs
from raytune_llm.train.reference_table import Table, Told, key_of, precomputed
from raytune_llm.train.stores import Stores
from raytune_llm.train.strategies.base import Strategy, trained


@dataclass(frozen=True)
class References:
    """How batches get what the reference says of them: from a table as they are made, or on the device in each step."""

    tables: dict[str, Table] = field(default_factory=dict)
    """By the store's hash."""
    online: Online | None = None
    choices: tuple[str, ...] = ()

    def finish(self, samples: Samples | Stream) -> dict[str, Any]:
        """Settings of the loader of these samples."""
        if not self.tables or not isinstance(samples, Samples) or not isinstance(samples.store, Store):
            return {}
        return {"finish": self.tables[samples.store.manifest_hash].attach}


def find_references(
    run: TrainRun,
    logps: AnswerLogprobs | None,
    strategy: Strategy,
    stores: Stores,
    config: PretrainedConfig,
    *,
    device: torch.device,
    compute: torch.dtype,
    pad_id: int,
    tell: Told,
) -> References:
    """Call it before weights are restored from a checkpoint."""
    if logps is None:
        return References()
    assert isinstance(run.stage, DPO | KTO), "no other stage's objective has a reference"
    other = other_model(run, config, device)
    if run.stage.reference == "online":
        return References(online=online(run, strategy, logps, other), choices=("reference: in each step",))
    as_found = (None if other is not None else _without_new_adapter(run, strategy)) or nullcontext
    tables: dict[str, Table] = {}
    choices = []
    assert isinstance(stores.train, Samples), "config/run.py lets a stream's reference be online only"
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
                store.folder.parent,
                key_of(run, logps, of_store, store.manifest_hash, compute),
                micro_batch_size=run.train.micro_batch_size,
                pad_id=pad_id,
                device=device,
                compute=compute,
                tell=tell,
            )
        choices.append(f"reference: {where}")
    return References(tables=tables, choices=tuple(choices))


@dataclass(frozen=True)
class Online:
    model: nn.Module
    logps: AnswerLogprobs
    initially: Callable[[], Any]
    """Around calls of the model: its weights are those of the reference."""

    def attach(self, batch: Any) -> Any:
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.initially():
            reference_P2 = self.logps(self.model, batch).detach()
        self.model.train(was_training)
        return replace(batch, per_answer={**batch.per_answer, "reference": reference_P2})


def online(run: TrainRun, strategy: Strategy, logps: AnswerLogprobs, other: nn.Module | None) -> Online:
    """To be called before weights are restored from a checkpoint: what they are then is the reference, unless it is `other`."""
    if other is not None:
        return Online(other, logps, nullcontext)
    if (as_found := _without_new_adapter(run, strategy)) is not None:
        return Online(strategy.model, logps, as_found)
    kept = [parameter.detach().clone() for _, parameter in trained(strategy.module)]
    return Online(strategy.model, logps, partial(_as_they_were, strategy.module, kept))


def _without_new_adapter(run: TrainRun, strategy: Strategy) -> Callable[[], Any] | None:
    """Around calls of the model: without the adapter that the run has put on it, whose products come to nothing before the first
    step. None where the run goes on from an adapter, or has none."""
    return partial(strategy.module.adapters.using, None) if run.adapter.starts_at_base else None


@contextmanager
def _as_they_were(module: nn.Module, kept: Sequence[torch.Tensor]) -> Iterator[None]:
    """Trained parameters have these values meanwhile."""
    parameters = [parameter.detach() for _, parameter in trained(module)]
    now = [parameter.clone() for parameter in parameters]
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]

    def become(values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
        for unit in units:
            unit.reshard()  # what is gathered already is not what the shards are now

    become(kept)
    try:
        yield
    finally:
        become(now)


def other_model(run: TrainRun, config: PretrainedConfig, device: torch.device) -> nn.Module | None:
    """The frozen model that stage.reference_model and stage.reference_adapter name, whole on this worker."""
    assert isinstance(run.stage, DPO | KTO)
    path, adapter = run.stage.reference_model, run.stage.reference_adapter
    if path is None and adapter is None:
        return None
    section = run.model if path is None else replace(run.model, path=path, weights="pretrained", config={})
    found = config if path is None else load_config(path, {}, trust_remote_code=run.model.trust_remote_code)
    if found.get_text_config().vocab_size != config.get_text_config().vocab_size:
        raise DataError(str(path), "is a reference with another vocabulary than the model's", "Take one of the same family.")
    compute = compute_dtype(run.train.precision, device)
    model, _ = build_policy(
        found,
        section,
        NoAdapter(name="none") if adapter is None else SavedAdapter(path=adapter, setting="stage.reference_adapter"),
        compute=compute,
        seed=run.train.seed,
        device=device,
        trains=False,
        quantization=UNQUANTIZED if adapter is None else run.quantization,
    )
    return model.requires_grad_(False).to(device).eval()

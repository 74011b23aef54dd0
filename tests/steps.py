"""Whole steps of a stage without a run: rows -> store -> loader -> objective, as the loop does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from raytune_llm.config.load import load_config
from raytune_llm.data import store as token_store
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.labeled import LabeledRow
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.data.loader import Loader
from raytune_llm.data.samples import Samples
from raytune_llm.data.steps import Step
from raytune_llm.data.store import Store
from raytune_llm.stages import STAGES, Objective
from raytune_llm.train.enrichers import Enricher, enriched
from raytune_llm.train.enrichers.global_statistics import FirstPass
from raytune_llm.train.enrichers.online_reference import OnlineReference


def objective_of(*overrides: str) -> Objective:
    """`stage=dpo`, `stage.beta=0.2`, ..."""
    stage = load_config("train", [*overrides, "data.path=rows.jsonl"]).stage
    return STAGES[stage.name].objective(stage)


def make_store(cache: Path, kind: str, rows: Sequence[Any], key: str = "key") -> Store:
    with token_store.under_construction(cache, key) as folder:
        if folder is not None:
            shard = token_store.write_shard(folder / token_store.shard_name(0), rows, Dropped(), kind=KINDS[kind])
            token_store.complete(folder, [shard], {"key": key}, cache / key, kind=kind)
    return Store.open(cache / key)


def pair_rows(chosen: Sequence[Any], rejected: Sequence[Any]) -> list[PairRow]:
    """From [prompt, answer] lists of the two sides."""
    return [PairRow(_ids(prompt), _ids(good), _ids(bad)) for (prompt, good), (_, bad) in zip(chosen, rejected, strict=True)]


def labeled_rows(rows: Sequence[Any], labels: Sequence[bool]) -> list[LabeledRow]:
    return [LabeledRow(_ids(prompt), _ids(answer), bool(label)) for (prompt, answer), label in zip(rows, labels, strict=True)]


def step_of(store: Store, *, max_length: int, packing: bool, micro: int, rank: int = 0, world: int = 1) -> Step:
    """The whole store as one step, in the store's order."""
    samples = Samples(store, np.arange(len(store)), max_length=max_length, packing=packing)
    together = micro * world
    loader = Loader(
        samples,
        micro_batch_size=micro,
        global_batch_size=-(-len(samples) // together) * together,
        rank=rank,
        world_size=world,
        seed=0,
        pad_id=0,
        shuffle=False,
    )
    (step,) = loader.epoch(0)
    return step


@dataclass(frozen=True)
class Outcome:
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    grad_norm: float


def run_step(model: nn.Module, objective: Objective, step: Step, reference: nn.Module | None = None) -> Outcome:
    """Loss, metrics and gradients of a step, as the mean over what it counts."""
    model.zero_grad()
    enrichers: list[Enricher] = []
    if objective.reference is not None:
        assert reference is not None
        enrichers.append(OnlineReference(objective.reference, other=reference))
    if objective.statistics is not None:
        enrichers.append(FirstPass(objective.statistics))
    batches = enriched(enrichers, model, step.batches, step)
    sums: dict[str, list[float]] = {}
    for batch in batches:
        out = objective.loss(model, batch)
        (out.total / step.count).backward()
        for name, (total, count) in {"loss": (out.total, out.count), **out.metrics}.items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + float(total), entry[1] + float(count)
    assert step.count is not None and math.isclose(sums["loss"][1], step.count, rel_tol=1e-6)
    means = {name: total / count for name, (total, count) in sums.items() if count}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(means.pop("loss"), means, gradients, float(get_total_norm(list(gradients.values()))))


def _ids(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int32)

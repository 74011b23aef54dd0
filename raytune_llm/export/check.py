"""What was written, held against the base with its adapter on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from raytune_llm.config.adapter import AdapterConfig, NoAdapter, SavedAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.batches import collate, to_device
from raytune_llm.data.pipeline import find_stores
from raytune_llm.data.samples import split_sources
from raytune_llm.data.store import Store
from raytune_llm.errors import UserError
from raytune_llm.export.source import Source
from raytune_llm.models.build import build_policy
from raytune_llm.models.load import load_config
from raytune_llm.models.scorer import Scorer
from raytune_llm.runs.stores import held_out_part

MAX_TOKENS = 128
"""Of a row."""
FREE_TIMES = 1.5
"""Memory for the model in float32, so many times over."""


@dataclass(frozen=True)
class Rows:
    ids: Sequence[np.ndarray]
    what: str


@dataclass(frozen=True)
class Difference:
    """Of what was written from the base with its adapter, both computed in float32."""

    divergence: float
    """Mean Kullback-Leibler divergence in nats a token; of a reward model, the largest difference of a score."""
    max_abs: float
    """The largest difference of a log-probability, or of a score."""
    tokens: int
    rows: str

    def said(self) -> str:
        return (
            f"on {self.tokens} tokens of {self.rows}, computed in float32: mean divergence {self.divergence:.2e} nats a token, "
            f"largest difference of a log-probability {self.max_abs:.2e}"
        )


def has_memory(source: Source) -> bool:
    numbers = sum(torch.Size(fact.shape).numel() for fact in source.facts.values())
    return psutil.virtual_memory().available > 4 * FREE_TIMES * numbers


def rows_to_check(source: Source, number: int) -> Rows:
    """Of the run's held-out rows, as far as its tokens are still there; else random tokens."""
    run = source.run
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
    size = source.config.get_text_config().vocab_size
    return Rows([draw.integers(0, size, MAX_TOKENS) for _ in range(number)], f"{number} rows of random tokens")


def compare(source: Source, written: Path, rows: Rows) -> Difference | None:
    """None for several adapters, of which nothing else computes the sum."""
    if len(source.adapters) > 1 or any(factor != 1.0 for _, factor in source.adapters):
        return None
    adapter: AdapterConfig | SavedAdapter = NoAdapter(name="none")
    for mergeable, _ in source.adapters:
        adapter = SavedAdapter(path=mergeable.folder, setting="export.run")
    before = replace(source.model, path=str(source.folder), revision=None)
    ours = _outputs(replace(before, path=str(written), config={}), NoAdapter(name="none"), rows, source.scores)
    theirs = list(_outputs(before, adapter, rows, source.scores))
    divergences, largest, tokens = [], 0.0, 0
    for one, other in zip(ours, theirs, strict=True):
        largest = max(largest, (one - other).abs().max().item())
        if source.scores:
            divergences.append((one - other).abs().max().item())
        else:
            divergences.append((other.exp() * (other - one)).sum(-1).sum().item())
        tokens += len(one)
    divergence = max(divergences) if source.scores else max(0.0, sum(divergences) / tokens)
    return Difference(divergence, largest, tokens, rows.what)


@torch.no_grad()
def _outputs(model: ModelConfig, adapter: AdapterConfig | SavedAdapter, rows: Rows, scores: bool) -> Iterator[Tensor]:
    """Of each row: log-probabilities [T - 1, V], or the score [1]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(str(model.path), model.config, trust_remote_code=model.trust_remote_code)
    settings = {"compute": torch.float32, "seed": 0, "device": device, "trains": False, "scores": scores}
    policy, _ = build_policy(config, model, adapter, **settings)
    policy.eval()
    for ids in rows.ids:
        spans = np.array([0, len(ids)], np.int32)
        batch = to_device(collate([[(ids.astype(np.int32), spans)]], length=len(ids), pad_id=0), device)
        if isinstance(policy, Scorer):
            yield policy(batch).cpu()
        else:
            yield policy(batch, lambda logits_NV, targets_N: logits_NV.float().log_softmax(-1)).cpu()

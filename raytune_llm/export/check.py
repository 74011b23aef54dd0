"""What was written, held against the base with its adapter on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from raytune_llm.config.adapter import AdapterConfig, NoAdapter, SavedAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.batches import collate, to_device
from raytune_llm.export.rows import Rows
from raytune_llm.export.source import Source
from raytune_llm.models.build import build_policy
from raytune_llm.models.load import load_config
from raytune_llm.models.scorer import Scorer

FREE_TIMES = 1.5
"""Memory for the model in float32, so many times over."""


@dataclass(frozen=True)
class Difference:
    """How far what was written differs from the base with its adapter, both computed in float32."""

    divergence: float
    """Mean Kullback-Leibler divergence in nats a token; of a reward model, the largest difference of a score."""
    max_abs: float
    """The largest difference of a log-probability, or of a score."""
    perplexity: float | None
    """The perplexity of the rows by what was written; None for a reward model."""
    perplexity_before: float | None
    """By the base with its adapter."""
    tokens: int
    rows: str

    def said(self) -> str:
        what = "score" if self.perplexity is None else "log-probability"
        perplexities = "" if self.perplexity is None else f", perplexity {self.perplexity_before:.4f} -> {self.perplexity:.4f}"
        return (
            f"on {self.tokens} tokens of {self.rows}, computed in float32: mean divergence {self.divergence:.2e} nats a token, "
            f"largest difference of a {what} {self.max_abs:.2e}{perplexities}"
        )


def has_memory(source: Source) -> bool:
    numbers = sum(torch.Size(fact.shape).numel() for fact in source.facts.values())
    return psutil.virtual_memory().available > 4 * FREE_TIMES * numbers


def can_compare(source: Source) -> bool:
    """False for several adapters, of which nothing else computes the sum."""
    return len(source.adapters) <= 1 and all(factor == 1.0 for _, factor in source.adapters)


def compare(source: Source, ours: Iterator[Tensor], rows: Rows) -> Difference:
    """ours: outputs of what was written, of each row."""
    adapter: AdapterConfig | SavedAdapter = NoAdapter(name="none")
    for mergeable, _ in source.adapters:
        adapter = SavedAdapter(path=mergeable.folder, setting="export.run")
    before = replace(source.model, path=str(source.folder), revision=None)
    # One model at a time is in memory; the base with its adapter first, which says what is wrong with an adapter of another base.
    theirs = list(outputs(before, adapter, rows, scores=source.scores, new_ids=source.token_ids))
    divergences, largest, tokens, logprobs = [], 0.0, 0, [0.0, 0.0]
    for one, other, ids in zip(ours, theirs, rows.ids, strict=True):
        largest = max(largest, (one - other).abs().max().item())
        if source.scores:
            divergences.append((one - other).abs().max().item())
        else:
            divergences.append((other.exp() * (other - one)).sum(-1).sum().item())
            targets_T1 = torch.from_numpy(ids[1:].astype("int64"))[:, None]
            for n, values in enumerate((one, other)):
                logprobs[n] += values.gather(1, targets_T1).sum().item()
        tokens += len(one)
    if source.scores:
        return Difference(max(divergences), largest, None, None, tokens, rows.what)
    after, first = (torch.tensor(-logprob / tokens).exp().item() for logprob in logprobs)
    return Difference(max(0.0, sum(divergences) / tokens), largest, after, first, tokens, rows.what)


@torch.no_grad()
def outputs(
    model: ModelConfig, adapter: AdapterConfig | SavedAdapter, rows: Rows, *, scores: bool, new_ids: Sequence[int] = ()
) -> Iterator[Tensor]:
    """For each row its log-probabilities [T - 1, V], or its score [1]. new_ids: tokens whose embeddings the adapter has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(str(model.path), model.config, trust_remote_code=model.trust_remote_code)
    settings: dict[str, Any] = {"compute": torch.float32, "seed": 0, "device": device, "trains": False, "scores": scores}
    settings["first_pieces"] = dict.fromkeys(new_ids, ())
    policy, _ = build_policy(config, model, adapter, **settings)
    policy.eval()
    for ids in rows.ids:
        spans = np.array([0, len(ids)], np.int32)
        batch = to_device(collate([[(ids.astype(np.int32), spans)]], length=len(ids), pad_id=0), device)
        if isinstance(policy, Scorer):
            yield policy(batch).cpu()
        else:
            yield policy(batch, lambda logits_NV, targets_N: logits_NV.float().log_softmax(-1)).cpu()

"""Comparing an export with the base and its adapter, on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytune_llm.config.adapter import AdapterConfig, NoAdapter, SavedAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.batches import collate, to_device
from raytune_llm.errors import DataError
from raytune_llm.export.rows import Rows
from raytune_llm.export.source import Source
from raytune_llm.models.build import build_policy
from raytune_llm.models.load import load_config
from raytune_llm.models.scorer import Scorer


@dataclass(frozen=True)
class Difference:
    """The difference between the export and the base with its adapter, both computed in float32."""

    divergence: float
    """The mean Kullback-Leibler divergence in nats per token; for a reward model, the largest difference of a score."""
    max_abs: float
    """The largest difference of a log-probability, or of a score."""
    perplexity: float | None
    """The perplexity of the rows with the export; None for a reward model."""
    perplexity_before: float | None
    """The perplexity of the rows with the base and its adapter; None for a reward model."""
    tokens: int
    rows: str

    def said(self) -> str:
        what = "score" if self.perplexity is None else "log-probability"
        perplexities = "" if self.perplexity is None else f", perplexity {self.perplexity_before:.4f} -> {self.perplexity:.4f}"
        return (
            f"on {self.tokens} tokens of {self.rows}, computed in float32: mean divergence {self.divergence:.2e} nats a token, "
            f"largest difference of a {what} {self.max_abs:.2e}{perplexities}"
        )


def can_compare(source: Source) -> bool:
    """Whether a comparison is possible. It is not for several adapters, since nothing else computes their sum."""
    return len(source.adapters) <= 1 and all(factor == 1.0 for _, factor in source.adapters)


def compare(
    source: Source, written: Callable[[Rows, torch.device], Iterator[Tensor]], rows: Rows, device: torch.device
) -> Difference:
    """Compare the export with its source. written: returns the export's outputs for each row. Raises DataError if outputs are not
    finite."""
    adapter: AdapterConfig | SavedAdapter = NoAdapter(name="none")
    for mergeable, _ in source.adapters:
        adapter = SavedAdapter(path=mergeable.folder, setting=mergeable.setting)
    before = replace(source.model, path=str(source.folder), revision=None)
    # One model is in memory at a time. The base with its adapter is first, since its errors explain an adapter of another base.
    theirs = list(outputs(before, adapter, rows, device, scores=source.scores, new_ids=source.token_ids))
    _check_numbers(theirs, Path(source.adapters[0][0].folder) if source.adapters else source.folder)
    divergences, differences, tokens, logprobs = [], [], 0, [0.0, 0.0]
    for one, other, ids in zip(written(rows, device), theirs, rows.ids, strict=True):
        apart = torch.where(one == other, 0.0, other - one)  # impossible tokens (-inf) are equal in both
        differences.append(apart.abs().max())
        if not source.scores:
            divergences.append((other.exp() * apart).sum().item())
            targets_T1 = torch.from_numpy(ids[1:].astype("int64"))[:, None]
            for n, values in enumerate((one, other)):
                logprobs[n] += values.gather(1, targets_T1).sum().item()
        tokens += len(one)
    largest = torch.stack(differences).max().item()  # NaN if any is
    if source.scores:
        return _finite(Difference(largest, largest, None, None, tokens, rows.what))
    after, first = (torch.tensor(-logprob / tokens).exp().item() for logprob in logprobs)
    divergence = sum(divergences) / tokens  # may be slightly negative by rounding
    return _finite(Difference(0.0 if divergence < 0 else divergence, largest, after, first, tokens, rows.what))


def _check_numbers(outputs: Sequence[Tensor], folder: Path) -> None:
    if any(row.isnan().any() for row in outputs):
        problem = "gives outputs that are not numbers (NaN): its weights are damaged, or its training diverged"
        raise DataError(str(folder), problem, "Export an earlier checkpoint, or train it again.")


def _finite(difference: Difference) -> Difference:
    figures = (difference.divergence, difference.max_abs, difference.perplexity, difference.perplexity_before)
    if not all(math.isfinite(figure) for figure in figures if figure is not None):
        fix = "Set export.dtype=fp32, or another export.format."
        raise DataError("the export", f"gives other outputs than its source, or none that are finite ({difference.said()})", fix)
    return difference


@torch.no_grad()
def outputs(
    model: ModelConfig,
    adapter: AdapterConfig | SavedAdapter,
    rows: Rows,
    device: torch.device,
    *,
    scores: bool,
    new_ids: Sequence[int] = (),
) -> Iterator[Tensor]:
    """For each row, its log-probabilities [T - 1, V], or its score [1]. new_ids: tokens whose embeddings belong to the
    adapter."""
    config = load_config(str(model.path), model.config, **model.config_options)
    settings: dict[str, Any] = {"compute": torch.float32, "seed": 0, "device": device, "training": None, "scores": scores}
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

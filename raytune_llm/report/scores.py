"""A reward model's scores of the held-out pairs, as JSON lines and as a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune_llm.data.batches import to_device
from raytune_llm.data.loader import Loader
from raytune_llm.report.plots import score_scatter

SCORES, PICTURE = "scores.jsonl", "scores.png"


@dataclass(frozen=True, slots=True)
class PairScores:
    source: str
    """Name of the data source; empty if there is only one."""
    row: int
    """Index of the row in the token store."""
    chosen: float
    rejected: float


@torch.no_grad()
def held_out_scores(
    model: nn.Module, scores: Callable[[nn.Module, Any], Tensor], loaders: Mapping[str, Loader], device: torch.device
) -> list[PairScores]:
    """Scores of all held-out pairs, sorted by source and row. A collective call: every worker gets all of them."""
    was_training = model.training
    model.eval()
    mine = [pair for source, loader in loaders.items() for pair in _of_source(model, scores, source, loader, device)]
    model.train(was_training)
    parts: list[Any] = [mine]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    return sorted((pair for part in parts for pair in part), key=lambda pair: (pair.source, pair.row))


def _of_source(
    model: nn.Module, scores: Callable[[nn.Module, Any], Tensor], source: str, loader: Loader, device: torch.device
) -> Iterator[PairScores]:
    for step in loader.epoch(0):
        for batch in step.batches:
            scores_P2 = scores(model, to_device(batch, device)).float().tolist()
            for row, (chosen, rejected) in zip(batch.rows, scores_P2, strict=True):
                yield PairScores(source, row, chosen, rejected)


def write_scores(pairs: Sequence[PairScores], output: Path) -> None:
    (output / SCORES).write_text("".join(f"{json.dumps(asdict(pair))}\n" for pair in pairs))
    score_scatter([pair.chosen for pair in pairs], [pair.rejected for pair in pairs], output / PICTURE)

"""Log-probabilities under the reference: the model as the run finds it, before its first step.

They are computed once, over all samples and by all workers, and kept beside the checkpoints: a run that goes on reads them, since
its model is the reference no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raytune_llm.data.batches import moved
from raytune_llm.data.loader import Loader, Samples
from raytune_llm.errors import DataError
from raytune_llm.stages import AnswerLogprobs
from raytune_llm.train.strategies.base import Strategy

FOLDER = "reference"


def fill_reference(
    strategy: Strategy,
    logps: AnswerLogprobs,
    samples: Mapping[str, Samples],
    folder: Path,
    *,
    goes_on: bool,
    loading: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Give each of the samples its table, from files by their names in the folder where the run goes on. All workers call it.

    loading: a Loader's settings, but for the order.
    """
    for name, one in samples.items():
        path = folder / f"{name}.npy"
        if goes_on and not path.exists():
            raise DataError(str(path), "is missing, and the model is the reference no more", "Set resume=never.")
        if goes_on:
            one.reference_R2 = torch.from_numpy(np.load(path))
            continue
        one.reference_R2 = computed(strategy, logps, Loader(one, shuffle=False, **loading), device)
        if not dist.is_initialized() or dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".partial.npy")
            np.save(beside, one.reference_R2.numpy())
            beside.replace(path)


@torch.no_grad()
def computed(strategy: Strategy, logps: AnswerLogprobs, loader: Loader, device: torch.device) -> Tensor:
    """float32 [R, 2] in host memory, in the order of the loader's rows."""
    strategy.model.eval()
    parts: list[Tensor] = []
    for step in loader.steps(0):
        part_A2 = torch.zeros(step.count, 2, device=device)
        for batch, first in zip(step.batches, step.first_rows, strict=True):
            value_P2 = logps(strategy.model, moved(batch, lambda tensor: tensor.to(device, non_blocking=True)))
            part_A2[first : first + len(value_P2)] = value_P2
        parts.append(part_A2)
    strategy.model.train()
    table_R2 = torch.cat(parts)
    if dist.is_initialized():
        dist.all_reduce(table_R2)  # every row is one worker's: the others add zero
    return table_R2.cpu()

from __future__ import annotations

import torch

from raytune_llm.records import Batch


def seed_dropout(batch: Batch) -> None:
    """Seeds dropout from the step and the samples, so that a resumed run, or a second pass over a batch, has the same dropout."""
    torch.manual_seed(hash((batch.seed, batch.sample_ids)))

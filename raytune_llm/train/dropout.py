from __future__ import annotations

import torch

from raytune_llm.records import Batch


def seed_dropout(batch: Batch) -> None:
    """Seed dropout from the step and the samples, so that a resumed run, or a second pass over a batch, drops the same values."""
    torch.manual_seed(hash((batch.seed, batch.sample_ids)))

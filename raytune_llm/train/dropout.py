from __future__ import annotations

import torch

from raytune_llm.records import Batch


def seed_dropout(batch: Batch) -> None:
    """Dropout is drawn from the step and the samples, so that a resumed run, or a second pass over a batch, draws the same."""
    torch.manual_seed(hash((batch.seed, batch.sample_ids)))

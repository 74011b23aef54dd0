from __future__ import annotations

from torch import nn

from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.records import Batch, LossOut


def sft(model: nn.Module, batch: Batch) -> LossOut:
    """Supervised fine-tuning: the negative log-likelihood of the trained tokens, in nats, summed."""
    loss_N = model(batch, cross_entropy)
    return LossOut(total=loss_N.sum(), count=loss_N.shape[0])

"""Learning from text: the tokens of answers (sft), or of everything (pretrain)."""

from __future__ import annotations

from torch import nn

from raytune_llm.config.stage import SFT, Pretrain
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.records import Batch, LossOut
from raytune_llm.stages.objective import Objective


def sft(section: SFT) -> Objective:
    return Objective(loss=next_token)


def pretrain(section: Pretrain) -> Objective:
    return Objective(loss=next_token)


def next_token(model: nn.Module, batch: Batch) -> LossOut:
    """The negative log-likelihood of the trained tokens, in nats, summed."""
    loss_N = model(batch, cross_entropy)
    return LossOut(total=loss_N.sum(), count=loss_N.shape[0])

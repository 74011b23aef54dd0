"""Reward models: scores of answers, learned from pairs."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from raytune_llm.config.stage import Reward
from raytune_llm.losses.reward import bradley_terry, centering, reward_metrics
from raytune_llm.records import Batch, LossOut
from raytune_llm.stages.objective import Objective

SEPARATE_HEAD = {"score": False, "v_head": True}
"""stage.value_head -> whether the score head is saved in a separate file."""


def reward(section: Reward) -> Objective:
    return Objective(
        loss=partial(_loss, margin=section.margin, centering_weight=section.centering),
        separate_head=SEPARATE_HEAD[section.value_head],
    )


def pair_scores(model: nn.Module, batch: Batch) -> Tensor:
    """[P, 2]: the scores of the chosen and of the rejected answer, each at its last token that is not padding."""
    return model(batch)[batch.per_answer["documents"]]


def _loss(model: nn.Module, batch: Batch, *, margin: float, centering_weight: float) -> LossOut:
    chosen_P, rejected_P = pair_scores(model, batch).unbind(1)
    loss_P = bradley_terry(chosen_P, rejected_P, margin + batch.per_answer["margins"])
    if centering_weight:
        loss_P = loss_P + centering_weight * centering(chosen_P, rejected_P)
    return LossOut(total=loss_P.sum(), count=len(loss_P), metrics=reward_metrics(chosen_P, rejected_P))

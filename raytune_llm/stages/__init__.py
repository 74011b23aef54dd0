"""Stages: name -> how a loss is computed from the model and a batch. A stage gives sums and counts, never means.

To add a stage, write its objective in a file here, enter it below, and add its section to config/stage.py and its values to
conf/stage.
"""

from __future__ import annotations

from raytune_llm.stages.kto import kto
from raytune_llm.stages.objective import AnswerLogprobs, GlobalStatistics, Objective, Stage, StageLoss
from raytune_llm.stages.preference import cpo, dpo, orpo, simpo
from raytune_llm.stages.reward import pair_scores, reward
from raytune_llm.stages.sft import pretrain, sft

__all__ = ["STAGES", "AnswerLogprobs", "GlobalStatistics", "Objective", "Stage", "StageLoss"]

STAGES: dict[str, Stage] = {
    "sft": Stage(objective=sft),
    "pretrain": Stage(objective=pretrain),
    "dpo": Stage(objective=dpo),
    "orpo": Stage(objective=orpo),
    "simpo": Stage(objective=simpo),
    "cpo": Stage(objective=cpo),
    "reward": Stage(objective=reward, scores=pair_scores),
    "kto": Stage(objective=kto),
}

"""Stages: name -> what one step means. A stage joins the model and a loss; it gives sums and counts, never means."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from raytune_llm.records import Batch, LossOut
from raytune_llm.stages.sft import sft

StageLoss = Callable[[nn.Module, Batch], LossOut]

STAGES: dict[str, StageLoss] = {"sft": sft}

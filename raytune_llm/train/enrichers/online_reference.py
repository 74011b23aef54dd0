"""Reference log-probabilities of answers, computed in each step by the policy as it was at the start, or by another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from raytune_llm.data.steps import Step
from raytune_llm.records import Batch
from raytune_llm.stages import AnswerLogprobs


@dataclass(frozen=True)
class OnlineReference:
    """Adds `reference`: float32 [P, 2]."""

    logps: AnswerLogprobs
    as_found: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context in which the policy has the weights that it had at the start of the run."""
    other: nn.Module | None = None
    """The reference, if it is not the policy."""
    phase = "reference"

    @torch.no_grad()
    def attach(self, policy: nn.Module, batches: Sequence[Batch], step: Step) -> list[Batch]:
        model = policy if self.other is None else self.other
        was_training = model.training
        model.eval()
        with self.as_found():
            references = [self.logps(model, batch).detach() for batch in batches]
        model.train(was_training)
        return [batch.with_answers({"reference": found}) for batch, found in zip(batches, references, strict=True)]

    def state(self) -> None:
        """None: a resumed run has the reference before it restores the trained weights from the checkpoint."""

    def load(self, state: None) -> None:
        pass

"""A reward model as its stage sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.records import Batch


class Scorer(CausalLM):
    """A language model whose head gives a document one number, at its last token."""

    scores = True

    def forward(self, batch: Batch) -> Tensor:  # type: ignore[override]
        """[S - 1]: the score of every document, padding among them."""
        hidden_BTD = self.hidden(batch)
        last_M = batch.cu_seqlens_S[1:].long() - 1
        hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, last_M)
        head = self.base.score
        with torch.autocast(hidden_MD.device.type, enabled=False):
            weight = next(parameter for parameter in head.parameters() if parameter.requires_grad)
            return head(hidden_MD.to(weight.dtype)).float().squeeze(-1)

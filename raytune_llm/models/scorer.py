"""A reward model as its stage sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.models.policy import Policy
from raytune_llm.models.score_head import choose_padding, name_padding, save_with_separate_head, separate_head_of_adapter
from raytune_llm.records import Batch


class Scorer(Policy):
    """A language model whose head gives a document one number, at its last token."""

    scores = True

    def __init__(self, model: nn.Module, *, language_model: Callable[[], PreTrainedModel] | None = None, **settings: Any) -> None:
        """language_model: loads what it was made from, where its head is to be saved beside a language model, in a file of its
        own. settings: a Policy's."""
        super().__init__(model, **settings)
        self._language_model = language_model

    def forward(self, batch: Batch) -> Tensor:
        """[S - 1]: the score of every document, padding among them."""
        hidden_BTD = self.hidden(batch)
        last_M = batch.cu_seqlens_S[1:].long() - 1
        return self.scores_of(hidden_BTD.flatten(0, 1).index_select(0, last_M))

    def scores_of(self, hidden_MD: Tensor) -> Tensor:
        """float32 [M]: of documents that end in these hidden states."""
        head = self.base.score
        with torch.autocast(hidden_MD.device.type, enabled=False):
            weights = sorted(head.parameters(), key=lambda parameter: parameter.requires_grad)  # an adapter has a copy, trained
            return head(hidden_MD.to(weights[-1].dtype)).float().squeeze(-1)

    def save(
        self,
        folder: Path,
        *,
        parameters: Mapping[str, Tensor],
        tokenizer: Any,
        stop_ids: Sequence[int],
        base_model: str | None = None,
    ) -> None:
        padding = choose_padding(tokenizer, stop_ids)
        super().save(folder, parameters=parameters, tokenizer=tokenizer, stop_ids=stop_ids, base_model=base_model)
        if padding is not None:
            name_padding(folder, padding)
        if self._language_model is not None and self.adapters.names:
            separate_head_of_adapter(folder)

    def _save_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        if self._language_model is None:
            super()._save_weights(folder, weights)
        else:
            model: Any = self._language_model()
            save_with_separate_head(folder, model.to(self.compute), weights)

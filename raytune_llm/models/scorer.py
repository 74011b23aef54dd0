"""A reward model as a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.errors import ConfigError
from raytune_llm.models.policy import Policy
from raytune_llm.models.score_head import (
    choose_padding,
    name_padding,
    read_separate_head,
    save_with_separate_head,
    separate_head_of_adapter,
)
from raytune_llm.records import Batch


class Scorer(Policy):
    """A language model whose head gives each document one score, at its last token that is not padding."""

    scores = True

    def __init__(self, model: nn.Module, *, language_model: Callable[[], PreTrainedModel] | None = None, **settings: Any) -> None:
        """language_model: loads the original language model, if the score head is to be saved in a separate file with it.
        settings: arguments of Policy."""
        super().__init__(model, **settings)
        self._language_model = language_model

    def forward(self, batch: Batch) -> Tensor:
        """[S - 1]: the score of every document, including padding documents."""
        hidden_BTD = self.hidden(batch)
        return self.scores_of(hidden_BTD.flatten(0, 1).index_select(0, self.scored_positions(batch)))

    def scored_positions(self, batch: Batch) -> Tensor:
        """int64 [S - 1]: the position in the flattened batch at which each document is scored.

        As in transformers, this is the last token that is not the padding token of the model's config. An adapter can't change
        that config; if the padding token is the one that ends answers (SmolLM2), it is the token before the end. With
        LLaMA-Factory's separate head, it is always the last token.
        """
        boundaries_S = batch.cu_seqlens_S.long()
        last_M, padding = boundaries_S[1:] - 1, self._padding
        if padding is None:
            return last_M
        ids_L = batch.ids_BT.flatten()
        counted_L = torch.where(ids_L != padding, torch.arange(len(ids_L), device=ids_L.device), 0)
        counted_M = counted_L.cummax(0).values.index_select(0, last_M)
        return torch.maximum(counted_M, boundaries_S[:-1]).minimum(last_M)

    @property
    def _padding(self) -> int | None:
        return None if self._language_model is not None else self.base.config.get_text_config().pad_token_id

    def scores_of(self, hidden_MD: Tensor) -> Tensor:
        """float32 [M]: the scores of documents, from the hidden states of their scored tokens."""
        head = self.base.score
        with torch.autocast(hidden_MD.device.type, enabled=False):
            weights = sorted(head.parameters(), key=lambda parameter: parameter.requires_grad)
            return head(hidden_MD.to(weights[-1].dtype)).float().squeeze(-1)

    def take_separate_head(self, folder: str | Path) -> None:
        """Replace the score head by the one in a folder's separate file."""
        weight_1D, bias_1 = read_separate_head(folder)
        here = next(self.base.score.parameters())
        if weight_1D.shape != here.shape:
            rule = f"must have a head over {here.shape[1]} numbers, as this model has"
            raise ConfigError("the reward model", rule, got=list(weight_1D.shape))
        head = nn.Linear(here.shape[1], 1, device=here.device, dtype=torch.float32).requires_grad_(False)
        head.load_state_dict({"weight": weight_1D, "bias": bias_1})
        self.base.score = head

    def _complete(self, folder: Path, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        padding = choose_padding(tokenizer, stop_ids) if self._padding is None else self._padding
        if padding is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
            name_padding(folder, padding)
        if self._language_model is not None and self.adapters.names:
            separate_head_of_adapter(folder)

    def _save_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        if self._language_model is None:
            super()._save_weights(folder, weights)
        else:
            save_with_separate_head(folder, self._language_model(), weights)

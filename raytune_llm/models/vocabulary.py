"""Extends a model's embeddings and head for new tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def grow(model: PreTrainedModel, first_pieces: Mapping[int, Sequence[int]]) -> None:
    """Initialize each new token's embedding, and its row of the head, with the mean of its pieces' (or of all, if it has no
    pieces).

    first_pieces: id of the new token -> ids of its pieces. Models often have more embeddings than their tokenizer has tokens, so
    there may be room already. On the meta device, only sizes change.
    """
    if not first_pieces:
        return
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if (needed := max(first_pieces) + 1) > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    old = min(rows, *first_pieces)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        parameters: Any = () if part is None else (part.weight, getattr(part, "bias", None))
        for parameter in parameters:
            if parameter is None or parameter.is_meta:
                continue
            values = parameter.detach()
            means = {id: values[pieces or slice(old)].float().mean(0) for id, pieces in first_pieces.items()}
            for id, mean in means.items():
                values[id] = mean.to(values.dtype)

"""A step of which the host has not read the tokens yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raytune_llm.engines.native.row import Row
from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.engines.requests import TokenLogprob


class Started:
    """A step that runs, or ran, on the device."""

    def __init__(
        self, pieces: Sequence[Piece], rows: Sequence[Row], tokens_R: Tensor, scored: Mapping[Row, TokenLogprob]
    ) -> None:
        """rows: those that get a token. scored: its log-probability, for rows that ask for it."""
        self.pieces, self.rows, self.scored = pieces, rows, scored
        self.places = [len(row.ids) for row in rows]
        """Of the new tokens in their rows."""
        self._tokens_R, self._copied = tokens_R, None
        if tokens_R.is_cuda:
            self._tokens_R = torch.empty(tokens_R.shape, dtype=tokens_R.dtype, pin_memory=True)
            self._tokens_R.copy_(tokens_R, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tokens(self) -> list[int]:
        """Wait for the step, but not for what was started after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tokens_R.tolist()

"""A step in which every row decodes, in memory that stays where it is: what a CUDA graph reads anew at each replay.

The numbers of a step are int32 end to end, so that one copy brings them: how many blocks a table has room for; then of each of
`rows` rows its token (-1 minus its place among the last step's tokens, where the host has not read it), its place in the row, its
place in the cache (-1: the row is padding), its length with the new token, its adapter's slot (-1: none); then the tables, row by
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raytune_llm.models.attention.cache import PagedCache

TOKEN, POSITION, PLACE, LENGTH, SLOT = range(5)


class StepNumbers:
    """The numbers of steps of at most so many rows and blocks a row: on the host, and copied to the device."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        size = 1 + 5 * max_rows + max_rows * max_blocks
        self.host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.device = torch.zeros(size, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def put(
        self,
        rows: int,
        tokens: Sequence[int],
        lengths: Sequence[int],
        slots: Sequence[int],
        blocks: Sequence[Sequence[int]],
        size: int,
    ) -> None:
        """Copy the numbers of a step of `rows` rows; rows beyond the given tokens are padding. size: tokens in a block."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy before has left the host's memory
        used, given = max(len(own) for own in blocks), len(tokens)
        flat = self.host.numpy()
        flat[0] = used
        columns = flat[1 : 1 + 5 * rows].reshape(5, rows)
        length_R = np.asarray(lengths, np.int32)
        tables = flat[1 + 5 * rows : 1 + 5 * rows + rows * used].reshape(rows, used)
        for number, own in enumerate(blocks):
            tables[number, : len(own)] = own
        columns[TOKEN, :given], columns[POSITION, :given], columns[LENGTH, :given] = tokens, length_R - 1, length_R
        columns[PLACE, :given] = tables[np.arange(given), (length_R - 1) // size] * size + (length_R - 1) % size
        columns[SLOT, :given] = slots
        columns[:, given:] = 0
        columns[PLACE, given:] = columns[SLOT, given:] = -1
        end = 1 + 5 * rows + rows * used
        self.device[:end].copy_(self.host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """R rows, whose new tokens they are, over a cache whose layers are alike."""

    keys: Tensor
    values: Tensor
    """[layers, blocks, block_size, heads, D]."""
    numbers: Tensor
    """int32: StepNumbers' on the device."""
    rows: int
    ids_BT: Tensor
    """int32 [1, R]"""

    @staticmethod
    def of(cache: PagedCache, numbers: StepNumbers, rows: int, sampled: Tensor) -> DecodeStep:
        """sampled: int32, the last step's tokens."""
        keys, values = cache.whole()
        token_R = numbers.device[1 + TOKEN * rows : 1 + (TOKEN + 1) * rows]
        ids_R = torch.where(token_R < 0, sampled[(-1 - token_R).clamp(min=0)], token_R)
        return DecodeStep(keys, values, numbers.device, rows, ids_R[None])

    def column(self, number: int) -> Tensor:
        """int32 [R]."""
        return self.numbers[1 + number * self.rows : 1 + (number + 1) * self.rows]

    @property
    def tables_RK(self) -> Tensor:
        """int32: numbers of the rows' blocks."""
        start = 1 + 5 * self.rows
        blocks = int(self.numbers[0])
        return self.numbers[start : start + self.rows * blocks].view(self.rows, blocks)

    @property
    def positions_BT(self) -> Tensor:
        """int32 [1, R]"""
        return self.column(POSITION)[None]

"""A mixture's frozen experts, which are one tensor, in a byte a weight with a scale a row of each expert.

They are held so and multiplied in the run's precision: the layer unpacks all of them once a pass, as it does those in four bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

BITS_PER_WEIGHT = 8.0


class Rows(nn.Module):
    """What reads the parameter. The scales are a buffer, which no strategy casts to another type."""

    def __init__(self, scales_EN1: Tensor, held: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scales", scales_EN1.float(), persistent=False)
        self.held, self.dtype = held, dtype

    def forward(self, bytes_ENK: Tensor) -> Tensor:
        return (bytes_ENK.view(self.held).to(self.dtype) * self.get_buffer("scales").to(self.dtype)).detach()


def hold_rows(experts: nn.Module, name: str, rows_ENK: Tensor, scales_EN1: Tensor) -> None:
    """In place of the parameter: rows, of a type of one byte, each of which stands for itself times its scale."""
    dtype = experts.get_parameter(name).dtype
    bytes_ENK = nn.Parameter(rows_ENK.view(torch.uint8), requires_grad=False)
    setattr(experts, name, bytes_ENK)
    parametrize.register_parametrization(experts, name, Rows(scales_EN1, rows_ENK.dtype, dtype), unsafe=True)
    _unpack_once_a_pass(experts)


def _unpack_once_a_pass(experts: nn.Module) -> None:
    """A layer may read its experts one by one. As `parametrize.cached`, in a form that a compiled layer can have: bitsandbytes'
    experts do the same."""
    experts.register_forward_pre_hook(_begin)
    # also where recomputation ends a pass within it, which torch does by an exception
    experts.register_forward_hook(_end, always_call=True)


def _begin(*_: Any) -> None:
    parametrize._cache_enabled += 1


def _end(*_: Any) -> None:
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}

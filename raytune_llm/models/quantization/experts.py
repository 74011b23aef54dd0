"""The frozen experts of a mixture, one tensor [E, N, K], with one byte per weight and one scale per row of each expert.

Products are in the run's precision. The layer dequantizes all of its experts once per pass, as it does with four bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

BITS_PER_WEIGHT = 8.0


class Rows(nn.Module):
    """The parametrization that dequantizes the parameter. The scales are a buffer, which no strategy casts."""

    def __init__(self, scales_EN1: Tensor, held: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scales", scales_EN1.float(), persistent=False)
        self.held, self.dtype = held, dtype

    def forward(self, bytes_ENK: Tensor) -> Tensor:
        return (bytes_ENK.view(self.held).to(self.dtype) * self.get_buffer("scales").to(self.dtype)).detach()


def hold_rows(experts: nn.Module, name: str, rows_ENK: Tensor, scales_EN1: Tensor) -> None:
    """Replace the parameter by rows of a one-byte dtype, parametrized so that reading it returns rows * scales."""
    dtype = experts.get_parameter(name).dtype
    bytes_ENK = nn.Parameter(rows_ENK.view(torch.uint8), requires_grad=False)
    setattr(experts, name, bytes_ENK)
    parametrize.register_parametrization(experts, name, Rows(scales_EN1, rows_ENK.dtype, dtype), unsafe=True)
    _unpack_once_a_pass(experts)


def _unpack_once_a_pass(experts: nn.Module) -> None:
    """Cache the dequantized experts within a pass, since a layer may read them one by one. Like `parametrize.cached`, but with
    hooks that torch.compile supports; bitsandbytes does the same."""
    experts.register_forward_pre_hook(_begin)
    # also where recomputation ends a pass within it, which torch does by an exception
    experts.register_forward_hook(_end, always_call=True)


def _begin(*_: Any) -> None:
    parametrize._cache_enabled += 1


def _end(*_: Any) -> None:
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}

"""FlashAttention 2 over boundaries (Dao 2023, arXiv 2307.08691), as torch has it; its signature differs by release."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 takes grouped heads as they are; later releases ask for the flag.
_GROUPED_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_over(
    q_LHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_queries_S: Tensor,
    cu_keys_S: Tensor,
    max_queries: int,
    max_keys: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Any:
    """[L, H, D]: each row's queries, which are its last tokens, attend to its keys up to themselves. On a GPU, in 16 bits."""
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    return varlen_attn(
        q_LHD, k_THD, v_THD, cu_queries_S, cu_keys_S, max_queries, max_keys, scale=scaling, window_size=window, **_GROUPED_HEADS
    )

"""Attention with a mask of every query and key: whatever is done to scores, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Scores(NamedTuple):
    """How a layer changes its attention scores before and in the softmax."""

    scaling: float | None
    """None: 1 / sqrt(Dh)."""
    sliding_window: int | None
    """How many tokens a token sees, itself among them; None: all that came before."""
    softcap: float | None
    """Scores become softcap tanh(score / softcap), as in Gemma 2."""
    sinks_H: Tensor | None = None
    """A score a head beside those of the keys, which takes its part of the weights and has no value (Xiao et al. 2023, arXiv
    2309.17453; learnt ones: gpt-oss)."""


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores, sinks_HT: Tensor | None = None
) -> Tensor:
    """[B, H, T, Dh]. mask: bool, broadcast to [B, H, T, keys]; it holds the window as well; None: each query sees all keys.
    Capped scores, and attention sinks, are spelled out.

    sinks_HT: [H, T] or [H, 1], a score a head beside those of the keys, which takes its part of the weights and has no value
    (Xiao et al. 2023, arXiv 2309.17453; learnt ones: gpt-oss).

    Each head gets its key and value: of torch's kernels for a mask on a GPU, the memory-efficient one takes no grouped heads.
    """
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if scores.softcap is None and sinks_HT is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scores.scaling)
    values = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling)
    if scores.softcap is not None:
        values = scores.softcap * torch.tanh(values / scores.softcap)
    if mask is not None:
        values = values.masked_fill(~mask, -torch.inf)
    if sinks_HT is not None:
        values = torch.cat([values, sinks_HT.to(values.dtype)[None, :, :, None].expand(*values.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(values, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights if sinks_HT is None else weights[..., :-1]) @ value

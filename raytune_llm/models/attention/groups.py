"""S2 attention (shifted sparse attention: LongLoRA, Chen et al. 2023, arXiv 2309.12307), for training on long rows.

Each document is cut into groups of so many tokens, and a token attends to what came before it in its group. For the second half
of the heads the groups begin half a group later, so that information passes from group to group. In training only: the model
that comes of it attends to everything, which costs nothing to change.

The groups are documents to a back end, which knows their boundaries anyway. They are counted from each document's first token,
so a row in a pack has the groups that it has alone, and the shifted ones don't wrap around: in the paper's code for packed rows
they don't either, in its code for padded ones the first half group sees the last one of the row, and with it what it is to
predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raytune_llm.models.attention.masked import Scores


def group_bounds(cu_seqlens_S: Tensor, num_tokens: int, group_tokens: int, *, shifted: bool) -> Tensor:
    """[K + 1]: where the groups of all documents begin, and the end. K follows from sizes alone, so that no host waits for a
    device; what is left of it are groups of no tokens at the end."""
    documents = cu_seqlens_S.shape[0] - 1
    place_L = torch.arange(num_tokens, device=cu_seqlens_S.device)
    starts_L = cu_seqlens_S.long()[torch.searchsorted(cu_seqlens_S.long(), place_L, right=True) - 1]
    position_L = place_L - starts_L
    first = (position_L - (group_tokens // 2 if shifted else 0)) % group_tokens == 0
    most = num_tokens // group_tokens + 2 * documents + 1
    found = torch.nonzero_static(first | (position_L == 0), size=most, fill_value=num_tokens)
    return found.squeeze(1).to(cu_seqlens_S.dtype)


def by_halves(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    *,
    shifted: Mapping[str, Any],
    **of_batch: Any,
) -> Tensor:
    """[B, T, H, Dh]: the first half of the heads (the smaller, if they are odd) with the batch's boundaries, the second with
    `shifted`."""
    half = query.shape[1] // 2
    if half % (query.shape[1] // key.shape[1]):  # a key's heads are in both halves
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    keys = half * key.shape[1] // query.shape[1]
    halves = (
        attend(query[:, heads], key[:, seen], value[:, seen], scores, **arguments)
        for heads, seen, arguments in (
            (slice(half), slice(keys), of_batch),
            (slice(half, None), slice(keys, None), shifted),
        )
    )
    return torch.cat(list(halves), dim=2)

"""Attention of new tokens over a paged cache, in torch's own operations, with a kernel for rows that decode on a GPU.

The new keys and values are written to the cache first. Then each new token attends to its row's tokens up to itself: rows that
decode all in one call (on a GPU in paged_kernels.py, whose plain twin is here), and each chunk of a prompt in a call of its own.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_llm.errors import ConfigError
from raytune_llm.models.attention.cache import CachedRows
from raytune_llm.models.attention.document_attention import document_attention
from raytune_llm.models.attention.masked import Scores, masked_attention


def cached_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores, rows: CachedRows, sinks_H: Tensor | None = None
) -> Tensor:
    """query [1, H, L, Dh], key and value [1, heads, L, Dh] of the new tokens -> [1, L, H, Dh] in the cache's type."""
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ConfigError(
            "engine",
            f"can't be native for a model whose {type(module).__name__} has no layer index",
            fix="Set engine=hf.",
        )
    q_LHD, k_LHD, v_LHD = (x.squeeze(0).transpose(0, 1).to(rows.cache.dtype) for x in (query, key, value))
    keys, values = rows.cache.write(layer, rows.places_L, k_LHD, v_LHD)
    out_LHD = q_LHD.new_empty((*q_LHD.shape[:2], v_LHD.shape[-1]))
    if rows.decoding:
        out_LHD[: rows.decoding] = _decoding(q_LHD[: rows.decoding], keys, values, scores, rows, sinks_H)
    if rows.decoding < len(rows.lengths) and _all_whole(q_LHD, v_LHD, scores, rows, sinks_H):
        first = rows.starts[rows.decoding]
        cu_seqlens_S = rows.cu_queries_S[rows.decoding :] - first
        new_LHD = (x[first:].contiguous() for x in (q_LHD, k_LHD, v_LHD))
        out_LHD[first:] = document_attention(*new_LHD, cu_seqlens_S, max(rows.lengths[rows.decoding :]), None, scores.scaling)
        return out_LHD.unsqueeze(0)
    for row in range(rows.decoding, len(rows.lengths)):
        new = slice(rows.starts[row], rows.starts[row + 1])
        count, length = new.stop - new.start, rows.lengths[row]
        plain = scores.softcap is None and sinks_H is None and length <= (scores.sliding_window or length)
        if plain and count == length:
            out_LHD[new] = _whole(q_LHD[new], k_LHD[new], v_LHD[new], scores.scaling)
        else:
            out_LHD[new] = _chunk(q_LHD[new], keys, values, scores, rows.tables_RK[row], length, sinks_H)
    return out_LHD.unsqueeze(0)


def _all_whole(q_LHD: Tensor, v_LHD: Tensor, scores: Scores, rows: CachedRows, sinks_H: Tensor | None) -> bool:
    """All prompts of the step begin in it, so that FlashAttention takes them in one call, like the documents of a pack."""
    head, sixteen_bits = q_LHD.shape[-1], q_LHD.dtype in (torch.bfloat16, torch.float16)
    takes = q_LHD.is_cuda and sixteen_bits and head == v_LHD.shape[-1] and head <= 256 and head % 8 == 0
    counts = (stop - start for start, stop in pairwise(rows.starts[rows.decoding :]))
    lengths = rows.lengths[rows.decoding :]
    bounded = scores.sliding_window is None or max(lengths) <= scores.sliding_window
    return takes and bounded and scores.softcap is None and sinks_H is None and tuple(counts) == lengths


def _decoding(q_RHD: Tensor, keys: Tensor, values: Tensor, scores: Scores, rows: CachedRows, sinks_H: Tensor | None) -> Tensor:
    """One new token a row."""
    if q_RHD.is_cuda:
        from raytune_llm.models.attention.paged_kernels import paged_decoding  # Triton is there with torch for GPUs alone

        return paged_decoding(q_RHD, keys, values, rows.tables_RK, rows.lengths_R, scores, sinks_H)
    return decoding(q_RHD, keys, values, scores, rows, sinks_H)


def decoding(q_RHD: Tensor, keys: Tensor, values: Tensor, scores: Scores, rows: CachedRows, sinks_H: Tensor | None) -> Tensor:
    """The plain twin of the kernel. The query heads that share a key are rows of one product with it, so that no key is copied
    for them (at 32 rows on a CPU, 4.5 times as fast as torch's grouped heads)."""
    R, H, head = q_RHD.shape
    size, heads, window = rows.cache.block_size, keys.shape[2], scores.sliding_window
    first = 0 if window is None else max(0, min(rows.lengths[:R]) - window) // size
    k, v = (_gathered(held, rows.tables_RK[:R, first : -(-rows.max_length // size)]) for held in (keys, values))
    position_T = torch.arange(first * size, first * size + k.shape[1], device=q_RHD.device)
    length_R1 = rows.lengths_R[:R, None]
    seen_RT = position_T < length_R1
    if window is not None:
        seen_RT &= position_T >= length_R1 - window
    out_RKGD = masked_attention(
        q_RHD.view(R, heads, H // heads, head),
        k.transpose(1, 2),
        v.transpose(1, 2),
        seen_RT[:, None, None],
        scores,
        None if sinks_H is None else sinks_H.view(heads, H // heads),
    )
    return out_RKGD.flatten(1, 2)


def _chunk(
    q_NHD: Tensor, keys: Tensor, values: Tensor, scores: Scores, table_K: Tensor, length: int, sinks_H: Tensor | None
) -> Tensor:
    """The last N tokens of a row of this length."""
    N, size, window = q_NHD.shape[0], keys.shape[1], scores.sliding_window
    first = 0 if window is None else max(0, length - N + 1 - window) // size
    k, v = (
        _gathered(held, table_K[None, first : -(-length // size)])[:, : length - first * size].transpose(1, 2)
        for held in (keys, values)
    )
    i = torch.arange(length - N, length, device=q_NHD.device)[:, None]
    j = torch.arange(first * size, length, device=q_NHD.device)
    seen_NT = j <= i
    if window is not None:
        seen_NT &= i - j < window
    out_HND = masked_attention(
        q_NHD.transpose(0, 1)[None], k, v, seen_NT, scores, None if sinks_H is None else sinks_H[:, None]
    ).squeeze(0)
    return out_HND.transpose(0, 1)


def _whole(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, scaling: float | None) -> Tensor:
    """All tokens of a row, of which none was in the cache."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHD, k_NHD, v_NHD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=k.shape[1] != q.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _gathered(held: Tensor, tables_RK: Tensor) -> Tensor:
    """[R, K * block_size, heads, Dh]: these blocks side by side."""
    R, K = tables_RK.shape
    return held.flatten(1).index_select(0, tables_RK.flatten()).view(R, K * held.shape[1], *held.shape[2:])

"""Attention of new tokens over a paged cache, in torch's own operations, on any device.

The new keys and values are written to the cache first. Then each new token attends to its row's tokens up to itself: rows that
decode all in one call, over their blocks side by side, and each chunk of a prompt in a call of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_llm.errors import ConfigError
from raytune_llm.models.attention.cache import CachedRows, ReadPlaces
from raytune_llm.models.attention.decode_step import DecodeStep
from raytune_llm.models.attention.masked import Scores, masked_attention
from raytune_llm.models.attention.paged_decode import paged_decode
from raytune_llm.models.attention.varlen import varlen_over


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    rows: CachedRows | DecodeStep,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """query [1, H, L, Dh], key and value [1, heads, L, Dh] of the new tokens -> [1, L, H, Dh] in the cache's type."""
    if isinstance(rows, DecodeStep):
        assert sinks_H is None, "a model with attention sinks is not captured"
        return _decode_step(module, query, key, value, scores, rows)
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ConfigError(
            "engine",
            f"can't be native for a model whose {type(module).__name__} has no layer index",
            fix="Set engine=hf.",
        )
    q_LHD, k_LHD, v_LHD = (x.squeeze(0).transpose(0, 1).to(rows.cache.dtype) for x in (query, key, value))
    keys, values = rows.cache.write(layer, rows.places_L, k_LHD, v_LHD)
    if rows.read is not None and scores.softcap is None and sinks_H is None and _flash_takes(q_LHD, v_LHD):
        return _flash(q_LHD, keys, values, scores, rows, rows.read).unsqueeze(0)
    if rows.behind_F is not None:
        rows.cache.clear(layer, rows.behind_F)
    out_LHD = q_LHD.new_empty((*q_LHD.shape[:2], v_LHD.shape[-1]))
    if rows.decoding:
        out_LHD[: rows.decoding] = _decoding(q_LHD[: rows.decoding], keys, values, scores, rows, sinks_H)
    for row in range(rows.decoding, len(rows.lengths)):
        new = slice(rows.starts[row], rows.starts[row + 1])
        count, length = new.stop - new.start, rows.lengths[row]
        plain = scores.softcap is None and sinks_H is None and length <= (scores.sliding_window or length)
        if plain and count == length:
            out_LHD[new] = _whole(q_LHD[new], k_LHD[new], v_LHD[new], scores.scaling)
        else:
            out_LHD[new] = _chunk(q_LHD[new], keys, values, scores, rows.tables_RK[row], length, sinks_H)
    return out_LHD.unsqueeze(0)


def _decode_step(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores, step: DecodeStep) -> Tensor:
    q_RHD, k_RKD, v_RKD = (x.squeeze(0).transpose(0, 1).to(step.keys.dtype) for x in (query, key, value))
    layer_1: Tensor = module.cache_layer  # type: ignore[assignment]
    scaling = q_RHD.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    window, softcap = scores.sliding_window or 0, scores.softcap or 0.0
    out_RHD = paged_decode(
        q_RHD, k_RKD, v_RKD, step.keys, step.values, layer_1, step.numbers, step.rows, scaling, window, softcap
    )
    return out_RHD.unsqueeze(0)


def _decoding(q_RHD: Tensor, keys: Tensor, values: Tensor, scores: Scores, rows: CachedRows, sinks_H: Tensor | None) -> Tensor:
    """One new token a row. The query heads that share a key are rows of one product with it, so that no key is copied for
    them, as torch's grouped heads do on a CPU."""
    R, H, head = q_RHD.shape
    size, heads, window = rows.cache.block_size, keys.shape[2], scores.sliding_window
    first = 0 if window is None else max(0, min(rows.lengths[:R]) - window) // size
    k, v = (_gathered(held, rows.tables_RK[:R, first : -(-rows.max_length // size)]) for held in (keys, values))
    seen_RT = None
    if R == 1:  # a row alone needs no mask: its keys are cut to those that it sees
        length, start = rows.lengths[0], 0 if window is None else max(0, rows.lengths[0] - window)
        k, v = (held[:, start - first * size : length - first * size] for held in (k, v))
    else:
        position_T = torch.arange(first * size, first * size + k.shape[1], device=q_RHD.device)
        length_R1 = rows.lengths_R[:R, None]
        seen_RT = position_T < length_R1
        if window is not None:
            seen_RT &= position_T >= length_R1 - window
    out_RKGD = masked_attention(
        q_RHD.view(R, heads, H // heads, head),
        k.transpose(1, 2),
        v.transpose(1, 2),
        None if seen_RT is None else seen_RT[:, None, None],
        scores,
        None if sinks_H is None else sinks_H.view(heads, H // heads),
    )
    return out_RKGD.flatten(1, 2)


def _flash_takes(q_LHD: Tensor, v_LHD: Tensor) -> bool:
    head = q_LHD.shape[-1]
    return q_LHD.dtype in (torch.bfloat16, torch.float16) and v_LHD.shape[-1] == head and head <= 256 and head % 8 == 0


def _flash(q_LHD: Tensor, keys: Tensor, values: Tensor, scores: Scores, rows: CachedRows, read: ReadPlaces) -> Tensor:
    """All rows in one call: FlashAttention over boundaries takes the queries of a row for its last tokens."""
    k_THD, v_THD = (held.flatten(0, 1).index_select(0, read.places_T) for held in (keys, values))
    return varlen_over(
        q_LHD,
        k_THD,
        v_THD,
        rows.cu_queries_S,
        read.cu_keys_S,
        read.max_queries,
        read.max_keys,
        scores.scaling,
        scores.sliding_window,
    )


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

"""Attention over a paged cache of keys and values: for decoding, with the layers that training computes with.

Blocks of `block_size` tokens lie in one tensor a layer; a row's block table says which are its. A step computes new tokens of
several rows, one of each that decodes and chunks of prompts, end to end as a pack has its documents. Their keys and values are
written to the cache first; then each token attends to its row's tokens up to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from raytune_llm.errors import ConfigError


class PagedCache:
    """Keys and values of every layer, [num_blocks, block_size, kv heads, Dh]."""

    def __init__(
        self, config: PretrainedConfig, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        text: Any = config.get_text_config()
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (text.num_hidden_layers, num_blocks, block_size, *_kv_shape(config))
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))


def bytes_a_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of the cache, keys and values of all layers."""
    text: Any = config.get_text_config()
    heads, head = _kv_shape(config)
    return 2 * text.num_hidden_layers * heads * head * dtype.itemsize


def check_cached(config: PretrainedConfig) -> None:
    """Raises ConfigError for a model whose layers carry more from token to token than keys and values."""
    text: Any = config.get_text_config()
    lacking = None
    if set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        lacking = "layers that carry a state, or see chunks"
    elif getattr(text, "kv_lora_rank", None) is not None:
        lacking = "latent attention"
    elif getattr(text, "num_kv_shared_layers", 0):
        lacking = "layers that share keys and values"
    if lacking is not None:
        raise ConfigError(
            "engine", f"can't be native for {config.model_type}, which has {lacking}", got="native", fix="Take engine=hf."
        )


def _kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    text: Any = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, head


@dataclass(frozen=True)
class CachedRows:
    """What a step computes, over R rows and L new tokens. Rows that decode, with one new token each, come first."""

    ids_1L: Tensor
    """int64: the new tokens, row by row."""
    positions_1L: Tensor
    """int64: where each stands in its row."""
    cache: PagedCache
    decoding: int
    """How many rows decode."""
    places_L: Tensor
    """int64: where in the cache, as one run of tokens, each new token's key and value go."""
    tables_RK: Tensor
    """int32: the blocks of each row, in order; what stands behind a row's last block is not read."""
    lengths_R: Tensor
    """int32: tokens of each row with its new ones."""
    starts: tuple[int, ...]
    """Of each row: where its new tokens begin among the L."""
    lengths: tuple[int, ...]
    """lengths_R on the host."""
    max_length: int
    """The longest row that decodes; a bound is enough."""


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rows: CachedRows,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """query [1, H, L, Dh], key and value [1, kv heads, L, Dh] of the new tokens -> [1, L, H, Dh]."""
    cache, layer = rows.cache, int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = (held[layer].flatten(0, 1) for held in (cache.keys, cache.values))
    q_LHD, k_LHD, v_LHD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    keys.index_copy_(0, rows.places_L, k_LHD.to(keys.dtype))
    values.index_copy_(0, rows.places_L, v_LHD.to(values.dtype))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    if rows.decoding:
        parts.append(_decoding(q_LHD[: rows.decoding], keys, values, rows, scale, sliding_window, softcap))
    for row in range(rows.decoding, len(rows.lengths)):
        start, stop = rows.starts[row], (*rows.starts, len(q_LHD))[row + 1]
        parts.append(_chunk(q_LHD[start:stop], keys, values, rows, row, scale, sliding_window, softcap))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)


def _decoding(
    q_RHD: Tensor, keys: Tensor, values: Tensor, rows: CachedRows, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """One new token a row. The query heads of a group are rows of one product with the keys that they share."""
    R, H, head = q_RHD.shape
    heads, size = keys.shape[1], rows.cache.block_size
    first = 0 if window is None else max(0, min(rows.lengths[:R]) - window) // size
    blocks = -(-rows.max_length // size)
    places_RT = _places(rows.tables_RK[:R, first:blocks], size)
    positions_T = torch.arange(first * size, blocks * size, device=q_RHD.device)
    lengths_R1 = rows.lengths_R[:R, None]
    seen_RT = positions_T < lengths_R1
    if window is not None:
        seen_RT &= positions_T >= lengths_R1 - window
    k_RKTD, v_RKTD = (held[places_RT].transpose(1, 2) for held in (keys, values))
    q_RKGD = q_RHD.view(R, heads, H // heads, head)
    return _attend(q_RKGD, k_RKTD, v_RKTD, seen_RT[:, None, None], scaling, softcap).reshape(R, H, head)


def _chunk(
    q_NHD: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: CachedRows,
    row: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The last N tokens of one row."""
    N, H, head = q_NHD.shape
    heads, size, length = keys.shape[1], rows.cache.block_size, rows.lengths[row]
    first = 0 if window is None else max(0, length - N + 1 - window) // size
    places_T = _places(rows.tables_RK[row : row + 1, first : -(-length // size)], size)[0, : length - first * size]
    k, v = (held[places_T].transpose(0, 1)[None] for held in (keys, values))
    q = q_NHD.transpose(0, 1)[None]
    T = k.shape[2]
    if T == N and window is None and softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=heads != H)
        return out[0].transpose(0, 1)
    i, j = torch.arange(T - N, T, device=q.device)[:, None], torch.arange(T, device=q.device)
    seen_NT = j <= i
    if window is not None:
        seen_NT &= i - j < window
    groups = H // heads
    q_1KMD = q.view(1, heads, groups, N, head).flatten(2, 3)
    out = _attend(q_1KMD, k, v, seen_NT.repeat(groups, 1)[None, None], scaling, softcap)
    return out.view(H, N, head).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """[R, kv heads, M, Dh] over [R, kv heads, T, Dh] where `seen`; capped scores are spelled out."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
    scores = q @ k.transpose(-1, -2) * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def _places(tables_RK: Tensor, block_size: int) -> Tensor:
    """[R, K * block_size]: where the tokens of these blocks lie."""
    within = torch.arange(block_size, device=tables_RK.device)
    return (tables_RK.long()[:, :, None] * block_size + within).flatten(1)

"""Attention within documents, in several ways: FlashAttention (varlen), FlexAttention with block masks, SDPA with a full mask.

A back end takes query [B, H, T, Dh], key and value (with fewer heads in grouped-query attention), the changes to the scores, and
what it needs of the batch: boundaries (cu_seqlens_S and max_seqlen), prefixes, or block masks. It returns [B, T, H, Dh].

With a KV cache (cached_rows) all back ends share one implementation (cached_attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from raytune_llm.errors import ConfigError
from raytune_llm.models.attention.cache import CachedRows
from raytune_llm.models.attention.cached_attention import cached_attention
from raytune_llm.models.attention.decode_step import DecodeStep
from raytune_llm.models.attention.document_attention import document_attention
from raytune_llm.models.attention.documents import document_mask
from raytune_llm.models.attention.groups import by_halves
from raytune_llm.models.attention.masked import Scores, masked_attention
from raytune_llm.models.attention.varlen import varlen_over
from raytune_llm.records import Prefixes

WINDOW_IN_MASK = "window_in_mask"
"""The attribute of an attention module that note_windows_in_masks sets."""
ALL_SLIDE = ("phimoe",)
"""Architectures, by model_type, in which every layer has a sliding window that only the model's mask contains. If layers differ,
the config's layer_types say which have one (Qwen2-MoE)."""


def as_transformers_calls(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """The back end with the signature of transformers' attention functions, which also return attention weights (here None)."""

    @wraps(attend)
    def called(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        cached_rows: CachedRows | DecodeStep | None = None,
        shifted: Mapping[str, Any] | None = None,
        **of_batch: Any,
    ) -> tuple[Tensor, None]:
        _check(module, attention_mask)
        sliding_window = getattr(module, WINDOW_IN_MASK, None) if sliding_window is None else sliding_window
        if cached_rows is not None:
            scores = Scores(scaling, sliding_window, softcap)
            return cached_attention(module, query, key, value, scores, cached_rows, s_aux), None
        scores = Scores(scaling, sliding_window, softcap, s_aux)
        _check_of_batch(of_batch)
        over = attend if shifted is None else partial(by_halves, attend, shifted=shifted)
        narrower = query.shape[-1] - value.shape[-1]  # as in multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434)
        if narrower:
            out = over(query, key, F.pad(value, (0, narrower)), scores, **of_batch)
            return out[..., :-narrower], None
        return over(query, key, value, scores, **of_batch), None

    return called


def _check(module: nn.Module, attention_mask: Tensor | None) -> None:
    """Raises ConfigError for a layer with its own attention mask or without causal attention."""
    if attention_mask is not None:
        raise ConfigError("model.path", "must be a model without its own attention mask, which no back end supports")
    if not getattr(module, "is_causal", True):
        raise ConfigError("model.path", "must be a model with causal attention")


def note_windows_in_masks(model: nn.Module) -> None:
    """Set on each attention module the sliding window that the model puts only into its mask, which no back end gets.

    This happens before the first pass: code that reads layer_idx within the pass would make torch.compile specialize for each
    layer, and it gives up after eight of these."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        number: Any = getattr(module, "layer_idx", None)
        if config is not None and isinstance(number, int):
            kinds: Any = getattr(config, "layer_types", None)
            slides = (
                kinds[number : number + 1] == ["sliding_attention"] if kinds else getattr(config, "model_type", None) in ALL_SLIDE
            )
            setattr(module, WINDOW_IN_MASK, config.sliding_window if slides else None)


def _check_of_batch(of_batch: Mapping[str, Any]) -> None:
    if "cu_seqlens_S" not in of_batch and "block_masks" not in of_batch:
        raise ConfigError("model.path", "must be a model that passes cu_seqlens on to its layers")


@as_transformers_calls
def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    *,
    cu_seqlens_S: Tensor,
    max_seqlen: int,
    prefixes: Prefixes | None = None,
    **_: object,
) -> Tensor:
    """Each document attends to itself and to its shared prompt: one varlen FlashAttention call on a GPU, one document after
    another on a CPU."""
    scaling, sliding_window, softcap, sinks_H = scores
    B, H, T, head = query.shape
    plain = sliding_window is None and softcap is None and sinks_H is None
    if cu_seqlens_S.shape[0] == 2 and plain:
        return _whole(query, key, value, scaling)
    q, k, v = _flat(query, key, value)
    if q.is_cuda:
        _check_no_sinks(scores)
    if q.is_cuda and prefixes is None:
        out = _over_boundaries(q, k, v, cu_seqlens_S, max_seqlen, scores)
    elif plain:
        out = document_attention(q, k, v, cu_seqlens_S, max_seqlen, prefixes, scaling)
    else:
        out = torch.cat(
            [_one_document(q[start:end], k[start:end], v[start:end], scores) for start, end in _documents(cu_seqlens_S)]
        )
    return out.view(B, T, H, head)


@as_transformers_calls
def flash3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    *,
    cu_seqlens_S: Tensor,
    max_seqlen: int,
    prefixes: Prefixes | None = None,
    **_: object,
) -> Tensor:
    """FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608), which torch uses in place of its own version 2."""
    B, H, T, head = query.shape
    _check_no_sinks(scores)
    q, k, v = _flat(query, key, value)
    if scores.sliding_window is None:
        out: Any = document_attention(q, k, v, cu_seqlens_S, max_seqlen, prefixes, scores.scaling)
    else:
        out = _over_boundaries(q, k, v, cu_seqlens_S, max_seqlen, scores)
    return out.view(B, T, H, head)


def _over_boundaries(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_S: Tensor, max_seqlen: int, scores: Scores) -> Any:
    """[L, H, Dh] each. What torch has for FlashAttention, on a GPU; it caps no scores, and choose knows."""
    return varlen_over(q, k, v, cu_seqlens_S, cu_seqlens_S, max_seqlen, max_seqlen, scores.scaling, scores.sliding_window)


def _flash2(*args: Tensor, **settings: Any) -> Any:
    """Dao 2023, arXiv 2307.08691."""
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func(*args, **settings)


@torch.compiler.disable
def _flash4(*args: Tensor, **settings: Any) -> Any:
    """For Hopper and Blackwell GPUs, from flash-attn-4, which compiles its kernels at their first call: no compiler may trace
    into that. It means by a window of -1 one that reaches a token back, and by None all that came before."""
    from flash_attn.cute import flash_attn_varlen_func

    left, right = settings.pop("window_size")
    return flash_attn_varlen_func(*args, window_size=(None if left == -1 else left, right), **settings)


@as_transformers_calls
def _packaged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    *,
    attend: Callable[..., Any],
    cu_seqlens_S: Tensor,
    max_seqlen: int,
    **_: object,
) -> Tensor:
    """FlashAttention from a package of its own."""
    _check_no_sinks(scores)
    scaling, sliding_window, softcap = scores[:3]
    B, H, T, head = query.shape
    q, k, v = _flat(query, key, value)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out = attend(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_S,
        cu_seqlens_k=cu_seqlens_S,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scaling,
        causal=True,
        window_size=window,
        softcap=softcap or 0.0,
    )
    out = out[0] if isinstance(out, tuple) else out  # 4 returns the logsumexp as well
    return out.view(B, T, H, head)


flash2, flash4 = (partial(_packaged, attend=attend) for attend in (_flash2, _flash4))


@as_transformers_calls
def flex(query: Tensor, key: Tensor, value: Tensor, scores: Scores, *, block_masks: dict[int, BlockMask], **_: object) -> Tensor:
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496) over blocks that are not empty; `block_masks` by window, 0 for none."""
    scaling, sliding_window, softcap, sinks_H = scores

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    found = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_masks[sliding_window or 0],
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        return_aux=None if sinks_H is None else AuxRequest(lse=True),
    )
    out = found if sinks_H is None else with_sinks(found[0], found[1].lse, sinks_H)
    return out.transpose(1, 2).contiguous()


def with_sinks(out_BHTD: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> Tensor:
    """The weights of all keys and a sink add up to 1, so those of the keys alone are too large by 1 + exp(sink - log-sum-exp)."""
    return out_BHTD * torch.sigmoid(lse_BHT - sinks_H.float()[:, None]).to(out_BHTD.dtype)[..., None]


@as_transformers_calls
def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    *,
    cu_seqlens_S: Tensor,
    prefixes: Prefixes | None = None,
    **_: object,
) -> Tensor:
    """The plain twin: one call with a mask of T x T a pack. Costs the whole square; for checks, and where nothing else runs."""
    mask = document_mask(cu_seqlens_S, query.shape[0], query.shape[2], scores.sliding_window, prefixes)
    return masked_attention(query, key, value, mask, scores, _over_queries(scores.sinks_H)).transpose(1, 2).contiguous()


def _whole(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention of one document, [1, H, T, Dh] -> [1, T, H, Dh]. It is likely a long one, for which cuDNN's kernel is faster than
    FlashAttention 2."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    return out.transpose(1, 2)


def _documents(cu_seqlens_S: Tensor) -> list[tuple[int, int]]:
    """Start and end of those that have tokens."""
    return [(start, end) for start, end in pairwise(cu_seqlens_S.tolist()) if start < end]


def _one_document(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """[L, H, Dh] for q, [L, Hk, Dh] for k and v."""
    L, (scaling, sliding_window, softcap, sinks_H) = q.shape[0], scores
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if softcap is not None or sinks_H is not None or (sliding_window is not None and sliding_window < L):
        mask = document_mask(torch.tensor([0, L]), 1, L, sliding_window)
        out = masked_attention(q, k, v, mask, scores, _over_queries(sinks_H))
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=k.shape[1] != q.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _over_queries(sinks_H: Tensor | None) -> Tensor | None:
    """[H, 1]"""
    return None if sinks_H is None else sinks_H[:, None]


def _check_no_sinks(scores: Scores) -> None:
    """Raises ConfigError for attention sinks, which a model's config does not always show beforehand."""
    if scores.sinks_H is not None:
        raise ConfigError(
            "model.attention",
            "can't be FlashAttention for a model with attention sinks",
            fix="Set model.attention=flex, or sdpa.",
        )


def _flat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, T, Dh] -> [B T, H, Dh] each."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return q, k, v


@lru_cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)

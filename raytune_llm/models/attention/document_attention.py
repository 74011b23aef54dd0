"""Attention of packed documents, some of which share a prompt with another, as an operator on flattened tokens.

The tokens of a document that shares another's prompt attend to that prompt and, causally, to their own document: two calls of a
kernel, merged by the log-sum-exp of their scores (Milakov & Gimelshein 2018, arXiv 1805.02867). The backward pass has nothing to
merge: the kernel's own, given the merged output and log-sum-exp, gives a call's share of the gradients (as in ring attention, Liu
et al. 2023, arXiv 2310.01889). Both are exact.

On a CPU a document is a call, so that nothing is computed between documents; the whole is one operator, since slices of tensors
would each have a gradient of the full size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from raytune_llm.records import Prefixes

aten = torch.ops.aten


def document_attention(
    q_LHD: Tensor,
    k_LHD: Tensor,
    v_LHD: Tensor,
    cu_seqlens_S: Tensor,
    max_seqlen: int,
    prefixes: Prefixes | None,
    scale: float | None,
) -> Tensor:
    """[L, H, Dh] of the L tokens of a batch; key and value may have fewer heads."""
    return _attend(q_LHD, k_LHD, v_LHD, cu_seqlens_S, max_seqlen, *(prefixes or _NONE), scale)[0]


_NONE = (None, None, None, None, 0, 0)


@torch.library.custom_op("raytune_llm::document_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    queries: Tensor | None,
    keys: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    max_queries: int,
    max_keys: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Output [L, H, Dh] and log-sum-exp [H, L]."""
    prefixes = _prefixes(queries, keys, cu_queries, cu_keys, max_queries, max_keys)
    return (_forward_on_gpu if q.is_cuda else _forward_on_cpu)(q, k, v, cu_seqlens, max_seqlen, prefixes, scale)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    tokens, heads = q.shape[:2]
    lse = q.new_empty((heads, tokens), dtype=wide) if q.is_cuda else q.new_empty((tokens, heads), dtype=wide).T
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("raytune_llm::document_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    queries: Tensor | None,
    keys: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    max_queries: int,
    max_keys: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    prefixes = _prefixes(queries, keys, cu_queries, cu_keys, max_queries, max_keys)
    backward = _backward_on_gpu if q.is_cuda else _backward_on_cpu
    return backward(grad.contiguous(), q, k, v, out, lse, cu_seqlens, max_seqlen, prefixes, scale)


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, max_seqlen, queries, keys, cu_queries, cu_keys, *ctx.rest = inputs
    ctx.max_seqlen = max_seqlen
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, queries, keys, cu_queries, cu_keys)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, *prefixes = ctx.saved_tensors
    grads = _attend_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, *prefixes, *ctx.rest)
    return (*grads, *[None] * 9)


_attend.register_autograd(_backward, setup_context=_setup)


def _prefixes(
    queries: Tensor | None,
    keys: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    max_queries: int,
    max_keys: int,
) -> Prefixes | None:
    if queries is None or keys is None or cu_queries is None or cu_keys is None:
        return None
    return Prefixes(queries, keys, cu_queries, cu_keys, max_queries, max_keys)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries [Q, H, Dh] and [H, Q], over different keys, as one over both."""
    merged = torch.logaddexp(lse, other_lse)
    share, other_share = (torch.exp(x - merged).T.unsqueeze(-1) for x in (lse, other_lse))
    return (out * share + other * other_share).to(out.dtype), merged


# On a CPU -------------------------------------------------------------------------------------------------------------


def _forward_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefixes: Prefixes | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    def attend(own: slice, seen: slice, causal: bool) -> tuple[Tensor, Tensor]:
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q[own], k[seen], v[seen]))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, causal, scale=scale)
        return out.squeeze(0).transpose(0, 1), lse.squeeze(0)

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32).T
    for own in _slices(cu_seqlens):
        out[own], lse[:, own] = attend(own, own, True)
    for own, seen in _ranges(prefixes):
        out[own], lse[:, own] = _merge(out[own], lse[:, own], *attend(own, seen, False))
    return out, lse


def _backward_on_cpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefixes: Prefixes | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    def gradients(own: slice, seen: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        of_grad, of_q, of_k, of_v, of_out = (
            x.transpose(0, 1).unsqueeze(0) for x in (grad[own], q[own], k[seen], v[seen], out[own])
        )
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            of_grad, of_q, of_k, of_v, of_out, lse[:, own].unsqueeze(0), 0.0, causal, scale=scale
        )
        return tuple(x.squeeze(0).transpose(0, 1) for x in grads)  # type: ignore[return-value]

    towards_q, towards_k, towards_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for own in _slices(cu_seqlens):
        towards_q[own], towards_k[own], towards_v[own] = gradients(own, own, True)
    for own, seen in _ranges(prefixes):
        for total, places, part in zip(
            (towards_q, towards_k, towards_v), (own, seen, seen), gradients(own, seen, False), strict=True
        ):
            total[places] += part
    return towards_q, towards_k, towards_v


def _slices(cu_seqlens: Tensor) -> list[slice]:
    """The tokens of each document that has some."""
    return [slice(start, end) for start, end in pairwise(cu_seqlens.tolist()) if start < end]


def _ranges(prefixes: Prefixes | None) -> list[tuple[slice, slice]]:
    """For each document that shares another's prompt: the slices of its own tokens and of the prompt's."""
    if prefixes is None:
        return []
    return list(zip(_runs(prefixes.queries_Q, prefixes.cu_queries_X), _runs(prefixes.keys_K, prefixes.cu_keys_X), strict=True))


def _runs(positions: Tensor, cu_lengths: Tensor) -> list[slice]:
    starts = positions[cu_lengths[:-1]].tolist()
    return [slice(start, start + length) for start, length in zip(starts, cu_lengths.diff().tolist(), strict=True)]


# On a GPU -------------------------------------------------------------------------------------------------------------


def _forward_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefixes: Prefixes | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> Any:
        found = aten._flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale)
        return found[:2]

    out, lse = attend(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, True)
    if prefixes is not None:
        queries, keys, cu_q, cu_k, max_q, max_k = prefixes
        other = attend(q[queries], k[keys], v[keys], cu_q, cu_k, max_q, max_k, False)
        merged, merged_lse = _merge(out[queries], lse[:, queries], *other)
        out.index_copy_(0, queries, merged)
        lse.index_copy_(1, queries, merged_lse)
    return out, lse


def _backward_on_gpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefixes: Prefixes | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dropout_state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)

    def gradients(tensors: tuple[Tensor, ...], cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> Any:
        return aten._flash_attention_backward(*tensors, cu_q, cu_k, max_q, max_k, 0.0, causal, dropout_state, unused, scale=scale)

    grads = gradients((grad, q, k, v, out, lse), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, True)
    if prefixes is not None:
        queries, keys, cu_q, cu_k, max_q, max_k = prefixes
        seen = (grad[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries].contiguous())
        for total, places, part in zip(
            grads, (queries, keys, keys), gradients(seen, cu_q, cu_k, max_q, max_k, False), strict=True
        ):
            total.index_add_(0, places, part)
    return grads

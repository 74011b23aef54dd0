"""Attention within documents: the back ends, and how one is chosen.

A back end takes transformers' attention signature (query [B, H, T, Dh], key and value with fewer heads where they are grouped)
and the batch's boundaries, cu_seqlens_S and max_seqlen, which the model passes through to every layer. No back end lets a token
see another document; one that can't keep that is not in the list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from raytune_llm.errors import ConfigError

# torch 2.11 takes grouped heads as they are; later releases ask for the flag.
_GROUPED_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens_S: Tensor,
    max_seqlen: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Each document attends to itself: FlashAttention over boundaries on a GPU, a document at a time on a CPU.

    Returns [B, T, H, Dh], as transformers expects.
    """
    B, H, T, head = query.shape
    if cu_seqlens_S.shape[0] == 2 and sliding_window is None:
        return _whole(query, key, value, scaling), None
    q, k, v = (x.transpose(1, 2).reshape(B * T, x.shape[1], head) for x in (query, key, value))
    if q.is_cuda:
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        out: Any = varlen_attn(
            q, k, v, cu_seqlens_S, cu_seqlens_S, max_seqlen, max_seqlen, scale=scaling, window_size=window, **_GROUPED_HEADS
        )
    else:
        out = torch.cat(
            [
                _one_document(q[start:end], k[start:end], v[start:end], scaling, sliding_window)
                for start, end in _documents(cu_seqlens_S)
            ]
        )
    return out.view(B, T, H, head), None


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens_S: Tensor,
    max_seqlen: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The plain twin: one call with a mask of T x T a pack. Costs the whole square; for checks, and where nothing else runs."""
    B, _H, T, _head = query.shape
    mask = document_mask(cu_seqlens_S, B, T, sliding_window)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


BACKENDS: dict[str, Callable] = {"varlen": varlen, "sdpa": sdpa}


def document_mask(cu_seqlens_S: Tensor, B: int, T: int, sliding_window: int | None = None) -> Tensor:
    """[B, 1, T, T], true where position i may see position j: same document, j not after i, and within the window."""
    flat = torch.arange(B * T, device=cu_seqlens_S.device)
    document_BT = torch.searchsorted(cu_seqlens_S.long(), flat, right=True).view(B, T)
    i, j = torch.arange(T, device=flat.device)[:, None], torch.arange(T, device=flat.device)[None, :]
    mask = (document_BT[:, :, None] == document_BT[:, None, :]) & (j <= i)
    if sliding_window is not None:
        mask &= i - j < sliding_window
    return mask[:, None]


def choose(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The back end to run and the reason for it."""
    on_gpu = device.type == "cuda"
    if asked == "auto":
        if not on_gpu:
            return "varlen", "a document at a time, on the CPU"
        if dtype in (torch.bfloat16, torch.float16):
            return "varlen", "torch's own FlashAttention over document boundaries"
        return "sdpa", f"FlashAttention needs bf16 or fp16, this run computes in {dtype}"
    if asked == "varlen" and on_gpu and dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            "model.attention",
            "can't be varlen on a GPU in fp32",
            got=asked,
            remedy="Take model.attention=sdpa or train.precision=bf16.",
        )
    return asked, "asked for"


def attach(model: PreTrainedModel, backend: str) -> None:
    """Let the model's layers call the back end. Generation needs `detach`, since back ends know no cache."""
    AttentionInterface.register(f"raytune_{backend}", BACKENDS[backend])
    model.set_attn_implementation(f"raytune_{backend}")


def detach(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")


def fixed(cu_seqlens_S: Tensor, max_seqlen: int) -> tuple[Tensor, int]:
    """The boundaries as compiled layers take them, so that no batch makes them compile again.

    How many there are may vary, and FlashAttention's bound on a document's length is rounded up to a power of two, 1,024 at
    least: blocks past a document's end return at once (0.3% of a step), and the bound takes few values.
    """
    torch._dynamo.maybe_mark_dynamic(cu_seqlens_S, 0)
    return cu_seqlens_S, max(1 << (max_seqlen - 1).bit_length(), 1024)


def _whole(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One document, a long one most likely, for which cuDNN's kernel is half as fast again as FlashAttention 2."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    return out.transpose(1, 2)


def _documents(cu_seqlens_S: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens_S.tolist()
    return list(pairwise(bounds))


def _one_document(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, sliding_window: int | None) -> Tensor:
    """[L, H, Dh] for q, [L, Hk, Dh] for k and v."""
    L = q.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mask = None
    if sliding_window is not None and sliding_window < L:
        mask = document_mask(torch.tensor([0, L]), 1, L, sliding_window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)

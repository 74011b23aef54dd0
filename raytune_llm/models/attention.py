"""Attention within documents: the back ends, and how one is chosen.

A back end takes transformers' attention signature (query [B, H, T, Dh], key and value with fewer heads where they are grouped)
and the batch's boundaries, cu_seqlens_S and max_seqlen, which the model passes through to every layer. No back end lets a token
see another document; one that can't keep that is not in the list. Where documents go on from the beginning of others, the batch's
prefixes come along, to the back ends that know what to make of them (PREFIXED).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from raytune_llm.errors import ConfigError
from raytune_llm.models.document_attention import document_attention
from raytune_llm.models.documents import document_numbers
from raytune_llm.records import Prefixes

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
    prefixes: Prefixes | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Each document attends to itself, and to what it goes on from: FlashAttention over boundaries on a GPU, a document at a time
    on a CPU.

    Returns [B, T, H, Dh], as transformers expects.
    """
    _refuse_sinks(s_aux)
    B, H, T, head = query.shape
    if cu_seqlens_S.shape[0] == 2 and sliding_window is None and softcap is None:
        return _whole(query, key, value, scaling), None
    q, k, v = _flat(query, key, value)
    if sliding_window is None and softcap is None and (prefixes is not None or not q.is_cuda):
        out: Any = document_attention(q, k, v, cu_seqlens_S, max_seqlen, prefixes, scaling)
    elif q.is_cuda:
        assert softcap is None, "choose takes another back end"
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        out = varlen_attn(
            q, k, v, cu_seqlens_S, cu_seqlens_S, max_seqlen, max_seqlen, scale=scaling, window_size=window, **_GROUPED_HEADS
        )
    else:
        out = torch.cat(
            [
                _one_document(q[start:end], k[start:end], v[start:end], scaling, sliding_window, softcap)
                for start, end in _documents(cu_seqlens_S)
            ]
        )
    return out.view(B, T, H, head), None


def _flash2() -> Callable[..., Any]:
    """Dao 2023, arXiv 2307.08691."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _flash3() -> Callable[..., Any]:
    """For the Hopper kind (Shah et al. 2024, arXiv 2407.08608)."""
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def packaged(
    load: Callable[[], Callable[..., Any]],
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """FlashAttention from a package that has to be built."""
    _refuse_sinks(s_aux)
    B, H, T, head = query.shape
    q, k, v = _flat(query, key, value)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out = load()(
        q, k, v, cu_seqlens_S, cu_seqlens_S, max_seqlen, max_seqlen,
        softmax_scale=scaling, causal=True, window_size=window, softcap=softcap or 0.0,
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out  # earlier releases of 3 return the logsumexp as well
    return out.view(B, T, H, head), None


def flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    block_masks: dict[int, BlockMask],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496) over blocks that are not empty; `block_masks` by window, 0 for none."""
    _refuse_sinks(s_aux)

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_masks[sliding_window or 0],
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens_S: Tensor,
    max_seqlen: int,
    prefixes: Prefixes | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The plain twin: one call with a mask of T x T a pack. Costs the whole square; for checks, and where nothing else runs."""
    _refuse_sinks(s_aux)
    B, _H, T, _head = query.shape
    mask = document_mask(cu_seqlens_S, B, T, sliding_window, prefixes)
    return _masked(query, key, value, mask, scaling, softcap).transpose(1, 2).contiguous(), None


BACKENDS: dict[str, Callable] = {
    "varlen": varlen,
    "flash2": partial(packaged, _flash2),
    "flash3": partial(packaged, _flash3),
    "flex": flex,
    "sdpa": sdpa,
}
PREFIXED = {"varlen", "flex", "sdpa"}
"""Back ends that let documents go on from others."""
BLOCK_MASKED = {"flex"}
"""Back ends that take block masks, built once a batch, beside the boundaries."""
BY_ITSELF = ("varlen", "sdpa", "flex")
"""What auto takes, the first that is possible. Packages that have to be built are taken where they are asked for."""


def prefix_bounds(prefixes: Prefixes, B: int, T: int) -> tuple[Tensor, Tensor]:
    """[B, T] each: first and end, in the row, of what each position's document goes on from; 0 and 0 where it does not."""
    lengths_X = prefixes.cu_queries_X.diff()
    firsts_X, lasts_X = (prefixes.keys_K[places.long()] % T for places in (prefixes.cu_keys_X[:-1], prefixes.cu_keys_X[1:] - 1))
    first_L, end_L = (
        torch.zeros(B * T, dtype=torch.int64, device=lengths_X.device).index_copy(
            0, prefixes.queries_Q, bounds_X.repeat_interleave(lengths_X, output_size=len(prefixes.queries_Q))
        )
        for bounds_X in (firsts_X, lasts_X + 1)
    )
    return first_L.view(B, T), end_L.view(B, T)


def document_mask(
    cu_seqlens_S: Tensor, B: int, T: int, sliding_window: int | None = None, prefixes: Prefixes | None = None
) -> Tensor:
    """[B, 1, T, T], true where position i may see position j: same document, j not after i, and within the window; or j is among
    what i's document goes on from."""
    document_BT = document_numbers(cu_seqlens_S, B, T)
    i, j = torch.arange(T, device=document_BT.device)[:, None], torch.arange(T, device=document_BT.device)[None, :]
    mask = (document_BT[:, :, None] == document_BT[:, None, :]) & (j <= i)
    if sliding_window is not None:
        mask &= i - j < sliding_window
    if prefixes is not None:
        first_BT, end_BT = prefix_bounds(prefixes, B, T)
        mask |= (j >= first_BT[:, :, None]) & (j < end_BT[:, :, None])
    return mask[:, None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What attention is to run on and with."""

    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] = (9, 0)
    """Of a CUDA device."""
    head: int = 128
    """Numbers a head."""
    softcap: bool = False
    """Scores are capped, as in Gemma 2."""


def case_of(config: PretrainedConfig, device_type: str, capability: tuple[int, int], dtype: torch.dtype) -> Case:
    text: Any = config.get_text_config()
    return Case(
        device_type=device_type,
        dtype=dtype,
        capability=capability,
        head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
    )


def capability_of(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; (0, 0) of another device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _flash_lacks(case: Case, *, name: str) -> str | None:
    if case.device_type != "cuda":
        return f"{name} needs a GPU"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"{name} needs bf16 or fp16, this run computes in {str(case.dtype).removeprefix('torch.')}"
    if case.capability < (8, 0):
        return f"{name} needs compute capability 8.0, this GPU has {case.capability[0]}.{case.capability[1]}"
    if case.head > 256 or case.head % 8:
        return f"{name} takes heads of at most 256 numbers, a multiple of 8, these have {case.head}"
    return None


def _varlen_lacks(case: Case) -> str | None:
    if case.device_type != "cuda":
        return None
    return "torch's FlashAttention caps no scores" if case.softcap else _flash_lacks(case, name="FlashAttention")


def _flash2_lacks(case: Case) -> str | None:
    if find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return _flash_lacks(case, name="FlashAttention 2")


def _flash3_lacks(case: Case) -> str | None:
    if find_spec("flash_attn_interface") is None:
        return "the package flash_attn_interface (FlashAttention 3) is not installed"
    if case.capability[0] != 9:
        return "FlashAttention 3 needs a GPU of the Hopper kind"
    return _flash_lacks(case, name="FlashAttention 3")


def _flex_lacks(case: Case) -> str | None:
    if case.device_type != "cuda":
        return "FlexAttention has no backward pass on a CPU"
    if case.capability < (8, 0):
        return f"FlexAttention needs compute capability 8.0, this GPU has {case.capability[0]}.{case.capability[1]}"
    return None


def _sdpa_lacks(case: Case) -> str | None:
    return None


LACKS: dict[str, Callable[[Case], str | None]] = {
    "varlen": _varlen_lacks,
    "flash2": _flash2_lacks,
    "flash3": _flash3_lacks,
    "flex": _flex_lacks,
    "sdpa": _sdpa_lacks,
}
"""What stands in the way of a back end, if anything."""
WHAT = {
    ("varlen", "cuda"): "torch's own FlashAttention over document boundaries",
    ("varlen", "cpu"): "a document at a time, on the CPU",
    ("flex", "cuda"): "blocks of a mask",
    ("sdpa", "cuda"): "a mask of every pair of positions",
}


def choose(asked: str, case: Case) -> tuple[str, str]:
    """The back end to run and the reason for it. Raises ConfigError where one that was asked for by name can't run."""
    if asked != "auto":
        lacking = LACKS[asked](case)
        if lacking is not None:
            raise ConfigError(
                "model.attention", f"can't be {asked} here: {lacking}", got=asked, remedy="Take model.attention=auto."
            )
        return asked, "asked for"
    order = ("varlen", "flex", "sdpa") if case.softcap else BY_ITSELF
    lacks = {name: LACKS[name](case) for name in order}
    backend = next(name for name in order if lacks[name] is None)
    passed_over = [lacking for name in order[: order.index(backend)] if (lacking := lacks[name]) is not None]
    return backend, "; ".join([*passed_over, WHAT.get((backend, case.device_type), "")])


def backend_to_expect(asked: str, config: PretrainedConfig, dtype: torch.dtype) -> str:
    """What is likely to run on a GPU that need not be here."""
    return choose(asked, case_of(config, "cuda", (9, 0), dtype))[0] if asked == "auto" else asked


def attach(model: PreTrainedModel, backend: str) -> None:
    """Let the model's layers call the back end. Generation needs it `detached`, since back ends know no cache."""
    AttentionInterface.register(f"raytune_{backend}", BACKENDS[backend])
    model.set_attn_implementation(f"raytune_{backend}")


@contextmanager
def detached(model: PreTrainedModel) -> Iterator[None]:
    """The model with transformers' own attention, for generation in the middle of training."""
    attached: str = model.config._attn_implementation  # type: ignore[assignment]
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("eager" if capped else "sdpa")  # transformers' sdpa leaves the cap out
    try:
        yield
    finally:
        model.set_attn_implementation(attached)


def shares_prefixes(asked: str, config: PretrainedConfig) -> bool:
    """Whether documents can go on from the beginning of others: the back end lets them, and every layer of the model looks at all
    that came before, not at a window of it or at a state that is carried on. On every device the same, so that runs are."""
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    whole = kinds == {"full_attention"} and getattr(text, "sliding_window", None) is None
    return whole and getattr(text, "attn_logit_softcapping", None) is None and (asked == "auto" or asked in PREFIXED)


def block_masks(
    backend: str, cu_seqlens_S: Tensor, B: int, T: int, window: int | None, prefixes: Prefixes | None = None
) -> dict[str, Any]:
    """What a back end takes beside the boundaries, by name: masks without a window and with the model's, built once a batch."""
    if backend not in BLOCK_MASKED:
        return {}
    document_BT = document_numbers(cu_seqlens_S, B, T)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document_BT[b, i] == document_BT[b, j]) & (j <= i)

    if prefixes is not None:
        first_BT, end_BT = prefix_bounds(prefixes, B, T)
        seen = partial(_seen_before, seen, first_BT, end_BT)
    build: Any = create_block_mask
    device = cu_seqlens_S.device.type
    masks = {0: build(seen, B, None, T, T, device=device)}
    if window is not None:
        near = partial(_seen_in_window, seen, window)
        masks[window] = build(near, B, None, T, T, device=device)
    return {"block_masks": masks}


def _seen_before(
    seen: Callable[..., Tensor], first_BT: Tensor, end_BT: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    return seen(b, h, i, j) | ((j >= first_BT[b, i]) & (j < end_BT[b, i]))


def _seen_in_window(seen: Callable[..., Tensor], window: int, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen(b, h, i, j) & (i - j < window)


def fixed(cu_seqlens_S: Tensor, max_seqlen: int) -> tuple[Tensor, int]:
    """The boundaries as compiled layers take them, so that no batch makes them compile again.

    How many there are may vary, and FlashAttention's bound on a document's length is rounded up to a power of two, 1,024 at
    least: blocks past a document's end return at once (0.3% of a step), and the bound takes few values.
    """
    torch._dynamo.maybe_mark_dynamic(cu_seqlens_S, 0)
    return cu_seqlens_S, max(1 << (max_seqlen - 1).bit_length(), 1024)


def fixed_prefixes(prefixes: Prefixes | None) -> Prefixes | None:
    """The same of what documents go on from."""
    if prefixes is None:
        return None
    queries_Q, keys_K, cu_queries_X, cu_keys_X, max_queries, max_keys = prefixes
    for tensor in (queries_Q, keys_K):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    cu_queries_X, max_queries = fixed(cu_queries_X, max_queries)
    cu_keys_X, max_keys = fixed(cu_keys_X, max_keys)
    return Prefixes(queries_Q, keys_K, cu_queries_X, cu_keys_X, max_queries, max_keys)


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


def _one_document(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """[L, H, Dh] for q, [L, Hk, Dh] for k and v."""
    L = q.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if softcap is not None or (sliding_window is not None and sliding_window < L):
        out = _masked(q, k, v, document_mask(torch.tensor([0, L]), 1, L, sliding_window), scaling, softcap)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=k.shape[1] != q.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """[B, H, T, Dh]. Capped scores (softcap tanh(score / softcap)) are spelled out."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _flat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, T, Dh] -> [B T, H, Dh] each."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return q, k, v


def _refuse_sinks(s_aux: Tensor | None) -> None:
    if s_aux is not None:
        raise ConfigError("model.path", "must be a model without attention sinks, which no back end here computes")


@lru_cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)

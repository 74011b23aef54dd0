"""Attention of rows that decode, over a paged cache, on a GPU: one new token a row, of a step whose shapes are fixed.

The new keys and values are written to the cache, then a program takes a part of a row's tokens under one key head, and the parts
are put together by their logarithms of sums (FlashDecoding: Dao et al. 2023; the softmax in pieces: Milakov and Gimelshein 2018,
arXiv 1805.02867). Lengths, tables and the number of the layer are read on the device, so that a CUDA graph can hold the step and
one compiled layer is all layers. The plain twin is `cached_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raytune_llm.models.attention.decode_step import LENGTH, PLACE, DecodeStep

SPLITS, PROGRAMS = 32, 264
"""A row's tokens are split over programs until there are about so many of these, two for each multiprocessor of an H100."""


@torch.library.custom_op("raytune_llm::paged_decode", mutates_args=())
def paged_decode(
    q_RHD: Tensor,
    k_RKD: Tensor,
    v_RKD: Tensor,
    keys: Tensor,
    values: Tensor,
    layer_1: Tensor,
    step: Tensor,
    columns: int,
    scaling: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attention of each row's new token over its row, itself included: [R, H, D].

    keys and values: the cache [layers, blocks, block_size, heads, D], to which this layer's new ones are written. The operator
    does not declare that it changes them, or the compiler would copy the cache; no other operator of a layer reads them.
    layer_1: int32 [1]. step: int32, of `DecodeStep`, for `columns` rows. window: tokens that a token attends to, 0 for all.
    softcap: 0 for none.
    """
    if not q_RHD.is_cuda:
        return plain(q_RHD, k_RKD, v_RKD, keys, values, layer_1, step, columns, scaling, window, softcap)
    from raytune_llm.models.attention.paged_kernels import attend, write

    write(k_RKD.contiguous(), v_RKD.contiguous(), keys, values, layer_1, step, columns)
    return attend(q_RHD.contiguous(), keys, values, layer_1, step, columns, scaling, window, softcap, _splits(q_RHD, keys))


@paged_decode.register_fake
def _(q_RHD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q_RHD, memory_format=torch.contiguous_format)


def _splits(q_RHD: Tensor, keys: Tensor) -> int:
    return max(1, min(SPLITS, PROGRAMS // (q_RHD.shape[0] * keys.shape[3])))


def plain(
    q_RHD: Tensor,
    k_RKD: Tensor,
    v_RKD: Tensor,
    keys: Tensor,
    values: Tensor,
    layer_1: Tensor,
    step: Tensor,
    columns: int,
    scaling: float,
    window: int,
    softcap: float,
) -> Tensor:
    """The same, a row after another."""
    read = DecodeStep(keys, values, step, columns, step[None, :0])
    place_R, length_R, tables_RK = read.column(PLACE).tolist(), read.column(LENGTH).tolist(), read.tables_RK.long()
    own_keys, own_values = (held[int(layer_1)] for held in (keys, values))
    out = torch.zeros_like(q_RHD)
    for row, (place, length) in enumerate(zip(place_R, length_R, strict=True)):
        if place < 0:
            continue
        own_keys.flatten(0, 1)[place], own_values.flatten(0, 1)[place] = k_RKD[row], v_RKD[row]
        first = max(length - window, 0) if window else 0
        groups = q_RHD.shape[1] // keys.shape[3]
        k_THD, v_THD = (
            held[tables_RK[row]].flatten(0, 1)[first:length].repeat_interleave(groups, 1) for held in (own_keys, own_values)
        )
        scores_HT = torch.einsum("hd,thd->ht", q_RHD[row].float(), k_THD.float()) * scaling
        scores_HT = softcap * torch.tanh(scores_HT / softcap) if softcap else scores_HT
        out[row] = torch.einsum("ht,thd->hd", scores_HT.softmax(1), v_THD.float()).to(out.dtype)
    return out

"""Keys and values of tokens that were computed before, in blocks that rows are given as they grow.

After vLLM's paged attention (Kwon et al. 2023, arXiv 2309.06180): a block holds `block_size` tokens of one row, and a row's table
names its blocks in order, so that rows of any length share one piece of memory without gaps between them. A place is the number
of a token's keys and values in all blocks laid end to end: block * block_size + its place in the block.

A step computes new tokens of several rows, end to end as a pack has its documents: one token of each row that decodes, and chunks
of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from raytune_llm.errors import ConfigError
from raytune_llm.models.attention.isolation import ATTENDS, ONE_ROW_A_LINE, computes_by_itself


class PagedCache:
    """Keys and values of every layer: [num_blocks, block_size, heads, Dh] each.

    A layer's are made when it first computes, in the shape of what it computes: families differ in heads and their sizes, some of
    them from layer to layer, and between keys and values.
    """

    def __init__(self, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device, alike: int = 0) -> None:
        """alike: number of layers that share a shape and are in one tensor (whole)."""
        self.num_blocks, self.block_size, self.dtype, self.device = num_blocks, block_size, dtype, device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._alike = alike
        self._whole: tuple[Tensor, Tensor] | None = None

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, which are alike, once one has computed: [layers, num_blocks, block_size, heads, Dh]."""
        assert self._whole is not None
        return self._whole

    @property
    def bytes_a_token(self) -> int:
        """Bytes per token of all layers; 0 before the first step."""
        return sum(held[0, 0].numel() * held.element_size() for layer in self.layers.values() for held in layer)

    def write(self, layer: int, places_L: Tensor, key_LHD: Tensor, value_LHD: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, with these at their places."""
        if layer not in self.layers:
            self.layers[layer] = self._made(layer, key_LHD, value_LHD)
        keys, values = self.layers[layer]
        keys.flatten(0, 1).index_copy_(0, places_L, key_LHD.to(self.dtype))
        values.flatten(0, 1).index_copy_(0, places_L, value_LHD.to(self.dtype))
        return keys, values

    def clear(self, layer: int, places_F: Tensor) -> None:
        """Zeros at these places of the layer."""
        if places_F.numel():
            for held in self.layers[layer]:
                held.flatten(0, 1).index_fill_(0, places_F, 0)

    def _made(self, layer: int, key_LHD: Tensor, value_LHD: Tensor) -> tuple[Tensor, Tensor]:
        if not self._alike:
            return self._empty(key_LHD), self._empty(value_LHD)
        if self._whole is None:
            self._whole = self._empty(key_LHD, self._alike), self._empty(value_LHD, self._alike)
        keys, values = self._whole
        assert keys.shape[3:] == key_LHD.shape[1:] and values.shape[3:] == value_LHD.shape[1:], "layers are alike"
        return keys[layer], values[layer]

    def _empty(self, like_LHD: Tensor, *layers: int) -> Tensor:
        """Zeros: what is behind a row's end is masked, but must be numbers, since 0 times another is none (`behind_F`)."""
        shape = (*layers, self.num_blocks, self.block_size, *like_LHD.shape[1:])
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


ATTENDS_TWICE = {
    "diffllama": "whose layers attend twice, with the same keys and other values",
    "hrm_text": "whose layers are gone through several times",
}
"""Architectures, by model_type, whose layers call attention more than once: a cache would hold the last call's values alone."""


def check_cached(config: PretrainedConfig) -> None:
    """Raises ConfigError for a model that a cache of keys and values is not enough for."""
    if (lacking := cache_lacks(config)) is not None:
        raise ConfigError("engine", f"can't be native for {config.model_type}, {lacking}", got="native", fix="Set engine=hf.")


def cache_lacks(config: PretrainedConfig) -> str | None:
    """Why a model is not computed over a cache of keys and values, if it is not."""
    text: Any = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    if others := sorted(set(kinds) - ATTENDS):
        return f"whose layers ({', '.join(others)}) have more state than keys and values"
    if getattr(text, "num_kv_shared_layers", None):
        return "whose last layers read the keys and values of earlier ones"
    if text.model_type in ATTENDS_TWICE:
        return ATTENDS_TWICE[text.model_type]
    if computes_by_itself(config):
        return "whose own code computes attention"
    return "whose layers keep what they need in a way of their own" if text.model_type in ONE_ROW_A_LINE and not kinds else None


class NewTokens(NamedTuple):
    """What a step computes of one row."""

    ids: Sequence[int]
    start: int
    """So many tokens of the row are in the cache."""
    blocks: Sequence[int]
    """The row's blocks, in order, with room for the new tokens."""


class ReadPlaces(NamedTuple):
    """What a step reads of the cache: all tokens of its rows, end to end."""

    places_T: Tensor
    """int64: where they are."""
    cu_keys_S: Tensor
    """int32 [R + 1]: where each row's begin among them."""
    max_queries: int
    max_keys: int


@dataclass(frozen=True, kw_only=True)
class CachedRows:
    """A step over a cache: R rows and L new tokens of theirs. Rows with one new token come first: those that decode."""

    cache: PagedCache
    ids_BT: Tensor
    """int64 [1, L]: the new tokens, row by row."""
    positions_BT: Tensor
    """int64 [1, L]: each one's place in its row."""
    places_L: Tensor
    """int64: where in the cache each token's key and value go (nano-vllm's slot_mapping)."""
    cu_queries_S: Tensor
    """int32 [R + 1]: where each row's new tokens begin among the L, and the end."""
    tables_RK: Tensor
    """int32: the blocks of each row, in order, and the last one again up to the length of the longest row."""
    lengths_R: Tensor
    """int32: tokens of each row, the new ones among them (vLLM's seqused_k)."""
    decoding: int
    """So many rows have one new token."""
    starts: tuple[int, ...]
    """cu_queries_S on the host."""
    lengths: tuple[int, ...]
    """lengths_R on the host."""
    max_length: int
    """Upper bound of the length of a decoding row."""
    behind_F: Tensor | None = None
    """int64: places behind the rows' ends in blocks that this step begins. What other rows left there is masked, but must be
    numbers. None: no operation of this step reads them."""
    read: ReadPlaces | None = None
    """The places to read from, on a GPU; None on a CPU."""

    @staticmethod
    def of(cache: PagedCache, rows: Sequence[NewTokens]) -> CachedRows:
        """The rows in this order, those with one new token first."""
        size = cache.block_size
        counts = np.array([len(row.ids) for row in rows])
        starts = np.array([row.start for row in rows])
        decoding = int((counts == 1).sum())
        assert decoding == len(rows) or (counts[:decoding] == 1).all(), "rows that decode come first"
        lengths = starts + counts
        tables = np.zeros((len(rows), -(-int(lengths.max()) // size)), np.int32)
        for number, row in enumerate(rows):
            blocks = row.blocks[: -(-int(lengths[number]) // size)]
            tables[number, : len(blocks)] = blocks
            tables[number, len(blocks) :] = blocks[-1]  # a row reads no other row's, of which those masked may be no numbers
        cu_queries = np.concatenate([[0], counts.cumsum()])
        row_L = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(row_L)) - cu_queries[row_L] + starts[row_L]
        places = tables[row_L, positions // size].astype(np.int64) * size + positions % size
        last = (lengths - 1) // size
        places_RS = (tables[np.arange(len(rows)), last].astype(np.int64) * size)[:, None] + np.arange(size)
        is_behind_RS = (starts <= last * size)[:, None] & (np.arange(size) >= (lengths - last * size)[:, None])
        ids = np.concatenate([np.asarray(row.ids, np.int64) for row in rows])

        def put(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(cache.device, non_blocking=True)

        read = None
        if cache.device.type == "cuda":
            cu_keys = np.concatenate([[0], lengths.cumsum()])
            row_T = np.repeat(np.arange(len(rows)), lengths)
            at = np.arange(len(row_T)) - cu_keys[row_T]
            read_places = tables[row_T, at // size].astype(np.int64) * size + at % size
            read = ReadPlaces(put(read_places), put(cu_keys.astype(np.int32)), int(counts.max()), int(lengths.max()))
        return CachedRows(
            cache=cache,
            ids_BT=put(ids)[None],
            positions_BT=put(positions)[None],
            places_L=put(places),
            cu_queries_S=put(cu_queries.astype(np.int32)),
            tables_RK=put(tables),
            behind_F=put(places_RS[is_behind_RS]),
            lengths_R=put(lengths.astype(np.int32)),
            decoding=decoding,
            starts=tuple(cu_queries.tolist()),
            lengths=tuple(lengths.tolist()),
            max_length=int(lengths[:decoding].max(initial=0)),
            read=read,
        )

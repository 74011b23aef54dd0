"""Steps with short prompts captured as CUDA graphs. Without them, launching a thousand kernels would delay the first token, and
the answers that are being generated.

There is a graph for each of several numbers of tokens, for a few whole prompts. The rest is padding: one more prompt, whose
output is unused and whose keys and values go to a spare block. Longer steps keep the GPU busy without graphs, and are not
captured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.models.attention.cache import CachedRows, PagedCache, ReadPlaces
from raytune_llm.models.policy import Policy

SIZES = (128, 256, 512, 1024)
PROMPTS = 16
"""The largest number of prompts in a step."""
IDS, POSITIONS, PLACES, SLOTS = range(4)


def lacks_for_prompt_graphs(config: PretrainedConfig, compute: torch.dtype) -> str | None:
    """Why steps with prompts can't be captured, or None: the attention is not a single varlen call."""
    text: Any = config.get_text_config()
    if compute not in (torch.bfloat16, torch.float16):
        return "FlashAttention takes 16 bits"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "its attention has a softcap"
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return None if head <= 256 and head % 8 == 0 else f"FlashAttention takes no heads of {head}"


class PromptGraphs:
    def __init__(self, policy: Policy, cache: PagedCache, bank: Any, *, spare: int, pool: Any) -> None:
        """spare: a block that no row uses. pool: the memory pool of other graphs in the same stream."""
        self._policy: Any = policy
        self._cache, self._bank, self._spare, self._pool = cache, bank, spare, pool
        self._graphs: dict[tuple[int, bool], tuple[Any, Tensor]] = {}
        size = 4 * SIZES[-1] + (PROMPTS + 2) + PROMPTS
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._device = torch.zeros(size, dtype=torch.int64, device=cache.device)
        self._copied = torch.cuda.Event()

    def takes(self, pieces: Sequence[Piece]) -> bool:
        whole = all(piece.start == 0 and piece.samples for piece in pieces)
        return whole and len(pieces) <= PROMPTS and sum(piece.stop for piece in pieces) <= SIZES[-1]

    @torch.no_grad()
    def warm_up(self) -> None:
        for size in reversed(SIZES):
            for adapted in (True, False) if self._bank is not None else (False,):
                self._put(size, [], [], [], [])
                self._graphs[size, adapted] = self._capture(size, adapted)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """The logits at the last token of each prompt, float32 [R, V]. The next step overwrites them."""
        rows, lengths = [piece.row for piece in pieces], [piece.stop for piece in pieces]
        size = SIZES[bisect_left(SIZES, sum(lengths))]
        slots = [row.slot for row in rows]
        self._put(size, [row.ids for row in rows], [row.blocks for row in rows], lengths, slots)
        graph, logits_SV = self._graphs[size, any(slot >= 0 for slot in slots)]
        graph.replay()
        return logits_SV[: len(rows)]

    def _put(
        self,
        size: int,
        ids: Sequence[Sequence[int]],
        blocks: Sequence[Sequence[int]],
        lengths: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        self._copied.synchronize()  # the copy before has left the host's memory
        block_size, total = self._cache.block_size, sum(lengths)
        numbers = self._host.numpy()
        columns, rest = numbers[: 4 * size].reshape(4, size), numbers[4 * size :]
        columns[IDS], columns[SLOTS] = 0, -1
        columns[POSITIONS, total:] = np.arange(size - total)
        columns[PLACES, total:] = self._spare * block_size + np.arange(size - total) % block_size
        ends = np.cumsum(lengths, dtype=np.int64)
        for own, of_row, length, slot, end in zip(ids, blocks, lengths, slots, ends, strict=True):
            at, place = slice(end - length, end), np.arange(length)
            columns[IDS, at], columns[POSITIONS, at], columns[SLOTS, at] = own[:length], place, slot
            columns[PLACES, at] = np.asarray(of_row, np.int64)[place // block_size] * block_size + place % block_size
        starts, wanted = rest[: PROMPTS + 2], rest[PROMPTS + 2 : 2 * PROMPTS + 2]
        starts[0], starts[1 : len(ends) + 1], starts[len(ends) + 1 :] = 0, ends, size
        wanted[: len(ends)], wanted[len(ends) :] = ends - 1, 0
        used = 4 * size + 2 * PROMPTS + 2
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        self._copied.record()

    def _capture(self, size: int, adapted: bool) -> tuple[Any, Tensor]:
        device = self._cache.device
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            self._computed(size, adapted)  # to let libraries take their memory
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_SV = self._computed(size, adapted)
        return graph, logits_SV

    def _computed(self, size: int, adapted: bool) -> Tensor:
        columns, rest = self._device[: 4 * size].view(4, size), self._device[4 * size :]
        cu_S = rest[: PROMPTS + 2].int()
        places_L = columns[PLACES]
        rows = CachedRows(
            cache=self._cache,
            ids_BT=columns[IDS][None],
            positions_BT=columns[POSITIONS][None],
            places_L=places_L,
            cu_queries_S=cu_S,
            tables_RK=cu_S[:0, None],
            lengths_R=cu_S[:0],
            decoding=0,
            starts=(),
            lengths=(),
            max_length=size,
            read=ReadPlaces(places_L, cu_S, size, size),
        )
        route = self._bank.by_slots(columns[SLOTS]) if adapted else {}
        hidden_1LD = self._policy.hidden(rows, route)
        return self._policy.logits(hidden_1LD[0].index_select(0, rest[PROMPTS + 2 : 2 * PROMPTS + 2]))

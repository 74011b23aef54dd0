"""Steps in which every row decodes, in static shapes: inputs at fixed addresses, numbers of rows from a short list.

A GPU computes a step of one token a row faster than the host launches it. So it is captured as a CUDA graph for each number of
rows in the list, once with adapters and once without, and replayed; rows that nobody reads, which write to a block of their own,
fill the next larger number up. Without a GPU the same steps run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raytune_llm.models.attention.cache import CachedRows, NewTokens, PagedCache

SMALL = (1, 2, 4, 8, 16, 24, 32)
STRIDE = 16
"""Numbers of rows that have a shape: SMALL, then each multiple of STRIDE."""
IDS, POSITIONS, PLACES, SLOTS = range(4)
"""Rows of the inputs that are int64."""


def shapes(max_rows: int) -> tuple[int, ...]:
    """Ascending; the last one has room for max_rows."""
    numbers = [number for number in (*SMALL, *range(SMALL[-1] + STRIDE, max_rows + STRIDE, STRIDE)) if number < max_rows]
    return (*numbers, max_rows)


class StaticSteps:
    def __init__(
        self,
        cache: PagedCache,
        compute: Callable[[CachedRows, Tensor | None], Tensor],
        *,
        max_rows: int,
        row_blocks: int,
        captures: bool,
    ) -> None:
        """compute: logits [R, V] of rows that decode, and the slot of each row's adapter, or None for all without one. It must
        ask nothing of the device. The cache's last block is for rows that fill up. row_blocks: of a row, at most."""
        self.max_rows = max_rows
        self._cache, self._compute, self._captures = cache, compute, captures
        self._shapes = shapes(max_rows)
        pinned = cache.device.type == "cuda"
        self._longs = torch.zeros(4, max_rows, dtype=torch.int64, device=cache.device)
        self._tables_RK = torch.zeros(max_rows, row_blocks, dtype=torch.int32, device=cache.device)
        self._lengths_R = torch.ones(max_rows, dtype=torch.int32, device=cache.device)
        self._host_longs = torch.zeros(4, max_rows, dtype=torch.int64, pin_memory=pinned)
        self._host_tables = torch.zeros(max_rows, row_blocks, dtype=torch.int32, pin_memory=pinned)
        self._host_lengths = torch.ones(max_rows, dtype=torch.int32, pin_memory=pinned)
        self._cu_queries_S = torch.arange(max_rows + 1, dtype=torch.int32, device=cache.device)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, rows: Sequence[NewTokens], slots: Sequence[int], *, routed: bool) -> Tensor:
        """float32 [R, V]: each row's logits, in its own memory until the next step. routed: a row has an adapter."""
        number = next(shape for shape in self._shapes if shape >= len(rows))
        lengths = self._fill(rows, slots, number)
        if not self._captures:
            return self._computed(number, routed, lengths)[: len(rows)]
        graph, logits_RV = self._graphs.get((number, routed)) or self._capture(number, routed)
        graph.replay()
        return logits_RV[: len(rows)]

    def warm(self, *, routed: bool) -> None:
        """Capture every shape, the largest first, whose memory the others share."""
        for number in reversed(self._shapes) if self._captures else ():
            if (number, routed) not in self._graphs:
                self._fill([], [], number)
                self._capture(number, routed)

    def _fill(self, rows: Sequence[NewTokens], slots: Sequence[int], number: int) -> tuple[int, ...]:
        """Bring the rows, and those that fill up to the number, to the device. The tokens of each."""
        size, spare = self._cache.block_size, self._cache.num_blocks - 1
        longs, tables, lengths = (x.numpy() for x in (self._host_longs, self._host_tables, self._host_lengths))
        width = 1
        for at, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            used = row.blocks[: row.start // size + 1]
            tables[at, : len(used)] = used
            longs[:, at] = row.ids[0], row.start, used[-1] * size + row.start % size, slot
            lengths[at] = row.start + 1
            width = max(width, len(used))
        longs[:, len(rows) : number] = np.array([0, 0, spare * size, -1])[:, None]
        tables[len(rows) : number, 0], lengths[len(rows) : number] = spare, 1
        for on_device, on_host in (
            (self._longs[:, :number], self._host_longs[:, :number]),
            (self._tables_RK[:number, :width], self._host_tables[:number, :width]),
            (self._lengths_R[:number], self._host_lengths[:number]),
        ):
            on_device.copy_(on_host, non_blocking=True)
        return tuple(lengths[:number].tolist())

    def _computed(self, number: int, routed: bool, lengths: tuple[int, ...]) -> Tensor:
        rows = CachedRows(
            cache=self._cache,
            ids_BT=self._longs[IDS, None, :number],
            positions_BT=self._longs[POSITIONS, None, :number],
            places_L=self._longs[PLACES, :number],
            cu_queries_S=self._cu_queries_S[: number + 1],
            tables_RK=self._tables_RK[:number],
            lengths_R=self._lengths_R[:number],
            decoding=number,
            starts=tuple(range(number + 1)),
            lengths=lengths,
            max_length=max(lengths),
        )
        return self._compute(rows, self._longs[SLOTS, :number] if routed else None)

    def _capture(self, number: int, routed: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph holds no value of the inputs: kernels read lengths and places on the device."""
        ones = (1,) * number
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._computed(number, routed, ones)  # kernels are built, and the cache's layers made, outside of the capture
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits_RV = self._computed(number, routed, ones)
        self._graphs[number, routed] = graph, logits_RV
        return graph, logits_RV

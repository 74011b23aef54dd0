"""Decoding steps captured as CUDA graphs, so that one replay launches all kernels of a step.

There is a graph for each of several batch sizes. Smaller steps are padded with rows that write nothing and whose output is
unused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.models.attention.cache import PagedCache
from raytune_llm.models.attention.decode_step import PLACE, SLOT, DecodeStep, StepNumbers
from raytune_llm.models.layers import named_layers
from raytune_llm.models.policy import Policy

DYNAMIC_ROPE = {"dynamic", "longrope"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def lacks_for_graphs(config: PretrainedConfig) -> str | None:
    """Why a model's decoding steps can't be captured, or None: the host computes something in each step, or layers differ in the
    shapes of keys and values."""
    text: Any = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    if kinds & DYNAMIC_ROPE:
        return "its rotary tables change as rows grow"
    if any(getattr(text, name, None) for name in EXPERTS):
        return "its experts are chosen on the host"
    odd = any(getattr(text, name, None) is not None for name in ("kv_lora_rank", "num_kv_shared_layers", "global_head_dim"))
    names = ("num_key_value_heads", "num_attention_heads")
    if odd or text.is_heterogeneous or not all(isinstance(getattr(text, name, None), int) for name in names):
        return "keys and values may differ from layer to layer"
    return None


class DecodeGraphs:
    def __init__(
        self,
        policy: Policy,
        cache: PagedCache,
        bank: Any,
        *,
        max_rows: int,
        max_length: int,
        compiled: bool,
        captured: bool = True,
    ) -> None:
        """captured: false runs the steps without graphs, for tests on a device that does not support them."""
        self._policy: Any = policy
        self._cache, self._bank, self._captured = cache, bank, captured
        self.sizes = sorted({size for size in SIZES if size < max_rows} | {max_rows})
        self._numbers = StepNumbers(max_rows, -(-max_length // cache.block_size), cache.device)
        self._sampled = torch.zeros(max_rows, dtype=torch.int32, device=cache.device)
        self._graphs: dict[tuple[int, bool], tuple[Any, Tensor]] = {}
        self.pool: Any = None
        """The graphs' memory pool, which other graphs in the same stream may share."""
        for number, (_, layer) in enumerate(named_layers(policy.base)):
            attention = next(part for part in layer.modules() if hasattr(part, "layer_idx") and _attends(part))
            # A tensor, since torch.compile would specialize each layer for a number.
            attention.register_buffer(
                "cache_layer", torch.tensor([number], dtype=torch.int32, device=cache.device), persistent=False
            )
            if compiled:
                layer.compile(dynamic=True)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile and capture all sizes, the largest first, since the others reuse its memory."""
        self._policy.eval()
        for size in reversed(self.sizes):
            for adapted in (True, False) if self._bank is not None else (False,):
                self._logits(size, adapted)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """The logits of each piece, which has one token, float32 [R, V]. The next step overwrites them."""
        rows = [piece.row for piece in pieces]
        size = self.sizes[bisect_left(self.sizes, len(rows))]
        lengths = [piece.stop for piece in pieces]
        slots = [row.slot for row in rows]
        tokens = [row.ids[piece.start] for row, piece in zip(rows, pieces, strict=True)]
        block_size = self._cache.block_size
        blocks = [row.blocks[: -(-length // block_size)] for row, length in zip(rows, lengths, strict=True)]
        self._numbers.put(size, tokens, lengths, slots, blocks, block_size)
        return self._logits(size, any(slot >= 0 for slot in slots))[: len(rows)]

    def sampled(self, tokens_R: Tensor) -> None:
        """Store the tokens sampled in a step, for the next one."""
        self._sampled[: len(tokens_R)].copy_(tokens_R)

    def _logits(self, size: int, adapted: bool) -> Tensor:
        if not self._captured:
            return self._computed(size, adapted)
        if (size, adapted) not in self._graphs:
            self._graphs[size, adapted] = self._capture(size, adapted)
        graph, logits_RV = self._graphs[size, adapted]
        graph.replay()
        return logits_RV

    def _capture(self, size: int, adapted: bool) -> tuple[Any, Tensor]:
        device = self._cache.device
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        held = self._numbers.device.clone()
        self._numbers.device.zero_()  # of padding alone: what is computed before the capture writes to no row's place
        numbers = self._numbers.device[1 : 1 + 5 * size].view(5, size)
        numbers[PLACE].fill_(-1)
        numbers[SLOT].fill_(-1)
        with torch.cuda.stream(aside):
            for _ in range(2):  # to compile, and to let libraries take their memory
                self._computed(size, adapted)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits_RV = self._computed(size, adapted)
        self.pool = self.pool or graph.pool()
        self._numbers.device.copy_(held)
        return graph, logits_RV

    def _computed(self, size: int, adapted: bool) -> Tensor:
        step = DecodeStep.of(self._cache, self._numbers, size, self._sampled)
        route: Mapping[str, Any] = self._bank.by_tokens(step.column(SLOT)) if adapted else {}
        hidden_1RD = self._policy.hidden(step, route)
        return self._policy.logits(hidden_1RD[0])


def _attends(part: nn.Module) -> bool:
    return "attention" in type(part).__name__.lower()

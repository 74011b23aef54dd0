"""Builds the engine for a model: weights, adapter slots and KV cache on one device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from raytune_llm.byte_size import in_units
from raytune_llm.config.adapter import NoAdapter, SavedAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.serve import NativeEngine as NativeSettings
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.graphs import DecodeGraphs, lacks_for_graphs
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.errors import ConfigError
from raytune_llm.models.activations import lacks_for_compiling
from raytune_llm.models.adapters import LoraBank, reads_weights
from raytune_llm.models.attention.cache import check_cached
from raytune_llm.models.attention.isolation import first_chunk
from raytune_llm.models.build import build_policy
from raytune_llm.models.few_rows import FewRows
from raytune_llm.models.fused import fuse
from raytune_llm.models.layers import layers
from raytune_llm.models.load import positions
from raytune_llm.models.onednn import OneDNN
from raytune_llm.models.packed import Packing, pack
from raytune_llm.models.scorer import Scorer

STEP_TOKENS = {"cpu": 512, "cuda": 8192}
"""The default of a step's tokens: enough to keep the device busy, few enough that a prompt does not delay answers for long."""
CPU_CACHE_BYTES = 4 * 2**30
CPU_ROW_TOKENS = 2048
"""On a CPU the cache has room for this many tokens per row, within CPU_CACHE_BYTES."""
PACKINGS: tuple[type[Packing], ...] = (OneDNN, FewRows)
WORKING_BYTES = 2 * 2**30
"""The GPU memory reserved for a step's activations."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served: model, adapters and limits. Engines get it in addition to their own settings."""

    model: ModelConfig
    quantization: QuantizationConfig
    config: PretrainedConfig
    tokenizer: Any
    end_ids: list[int]
    compute: torch.dtype
    device: torch.device
    max_length: int | None
    max_adapters: int
    max_rank: int
    max_host_adapters: int
    scores: bool = False
    """Whether it is a reward model."""
    adapter: SavedAdapter | None = None
    """An adapter that is part of the model: a reward model's, one with new tokens, or one that can't share a batch."""
    adapter_name: str | None = None
    """Its name in requests."""
    new_ids: Sequence[int] = ()
    """The new tokens of own_adapter."""
    head: str | None = None
    """The folder with a reward model's score head, if that is in a separate file."""

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens of a prompt and its answer; None: neither the settings nor the model's config say."""
        return min(filter(None, (self.max_length, positions(self.config))), default=None)


def native_engine(settings: NativeSettings, serving: Serving) -> NativeEngine:
    """The engine with its model loaded. Raises ConfigError for a model whose state does not fit the paged cache, and if
    not even one block of the cache fits the memory."""
    check_cached(serving.config)
    policy, _ = build_policy(
        serving.config,
        serving.model,
        serving.adapter or NoAdapter(name="none"),
        compute=serving.compute,
        seed=0,
        device=serving.device,
        quantization=serving.quantization,
        scores=serving.scores,
        separate_head=serving.head is not None,
        training=None,
        first_pieces=dict.fromkeys(serving.new_ids, ()),  # their embeddings are in the adapter
    )
    if serving.head is not None:
        assert isinstance(policy, Scorer)
        policy.take_separate_head(serving.head)
    a_token = policy.cache_bytes_a_token()
    bank = None
    if serving.adapter is None:
        bank = LoraBank(policy.base, num_slots=serving.max_adapters, max_rank=serving.max_rank, dtype=serving.compute)
    reads = serving.adapter is not None and reads_weights(serving.adapter)
    packing = next((one for one in PACKINGS if one.lacks(serving.device, serving.compute) is None), None)
    if packing is not None and not reads:
        pack(layers(policy.base), packing)
        if bank is not None and packing.joins_adapters:
            bank.join()
    if serving.device.type == "cuda" and serving.compute != torch.float32:
        fuse(policy.base)
    limit = serving.limit or 2**20
    graphs = None
    if _captures(settings, serving):
        graphs = partial(DecodeGraphs, policy, bank=bank, max_rows=settings.max_rows, max_length=limit, compiled=True)
    runner = PolicyRunner(
        policy,
        num_blocks=_num_blocks(settings, serving.device, a_token, limit),
        block_size=settings.block_size,
        device=serving.device,
        bank=bank,
        graphs=graphs,
    )
    return NativeEngine(
        runner,
        serving.tokenizer,
        end_ids=serving.end_ids,
        max_length=limit,
        max_rows=settings.max_rows,
        step_tokens=min(
            settings.step_tokens or STEP_TOKENS.get(serving.device.type, STEP_TOKENS["cpu"]),
            first_chunk(serving.config) or sys.maxsize,
        ),
        max_host_adapters=serving.max_host_adapters,
        prefix_cache=settings.prefix_cache,
        own_adapter=serving.adapter_name,
    )


def _captures(settings: NativeSettings, serving: Serving) -> bool:
    """Whether decoding steps are compiled and captured."""
    if serving.device.type != "cuda":
        lacking: str | None = "it needs a GPU"
    elif serving.scores:
        lacking = "a reward model doesn't decode"
    elif serving.adapter is not None:
        lacking = "the adapter is part of the model"
    else:
        lacking = lacks_for_compiling(serving.device) or lacks_for_graphs(serving.config)
    if settings.compile is True and lacking is not None:
        raise ConfigError("engine.compile", f"can't be true here: {lacking}", got=True, fix="Take engine.compile=auto.")
    return settings.compile is not False and lacking is None


def _num_blocks(settings: NativeSettings, device: torch.device, bytes_a_token: int, limit: int) -> int:
    """The number of blocks that fit the memory, but not more than all rows can use. Raises ConfigError if none fits."""
    a_block = settings.block_size * bytes_a_token
    if settings.cache_gib is not None:
        memory = int(settings.cache_gib * 2**30)
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = int(free - (1 - settings.gpu_memory) * total) - WORKING_BYTES
    else:
        memory = min(CPU_CACHE_BYTES, settings.max_rows * CPU_ROW_TOKENS * bytes_a_token)
    number = min(memory // a_block, settings.max_rows * -(-limit // settings.block_size))
    if number < 1:
        raise ConfigError(
            "engine.cache_gib",
            f"must hold a block of {settings.block_size} tokens, {in_units(a_block)}",
            got=in_units(max(memory, 0)),
            fix="Raise it or engine.gpu_memory, or take a smaller model.",
        )
    return number

"""What a run needs of one device's memory, by estimate, and which settings would make it need less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
from transformers import PretrainedConfig

from raytune_llm.config.adapter import AdapterConfig, LoRA, NoAdapter
from raytune_llm.config.run import TrainRun
from raytune_llm.config.section import settings_of
from raytune_llm.config.stage import DPO, KTO
from raytune_llm.config.strategy import DDP, FSDP, StrategyConfig
from raytune_llm.data.batches import KINDS
from raytune_llm.errors import ResourceError
from raytune_llm.models import attention
from raytune_llm.models.load import load_config
from raytune_llm.models.memory import (
    STATES,
    Memory,
    Parameters,
    count_parameters,
    dimensions,
    memory_per_gpu,
    quantized_bytes,
)
from raytune_llm.models.policy import DTYPES
from raytune_llm.stages import STAGES

GIB = 2**30
USABLE = 0.92
"""Of a device's memory: the rest goes to the CUDA context, to libraries, and to gaps between blocks."""
MIN_SHARDS = 8
"""Sharding is tried over so many workers where the run has fewer."""
TRIAL_LORA = LoRA(name="lora", rank=8, alpha=16.0, dropout=0.0, targets="all-linear", last_layers=None, path=None)
KEPT = {"none": 1.0, "selective": 0.5, "full": 0.0, "offload": 0.0}
"""By train.activation_checkpointing: the part of its activations that a layer keeps on the device for the backward pass."""
COMPILED_ONLY = {"selective"}
REMEDIES = 3
"""Sets of settings that are named where memory ran out."""
TAKES_MASK = {"sdpa"}
"""Attention back ends that are given a mask of every pair of positions."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What memory depends on and a user might change."""

    parameters: Parameters
    dropout: bool
    quantization: str
    strategy: StrategyConfig
    world_size: int
    micro_batch_size: int
    max_length: int
    checkpointing: str
    """none, selective, full or offload."""
    compiled: bool
    reference: str
    """none, precomputed or online."""
    reference_parameters: int
    """Of another model than the trained one."""


@dataclass(frozen=True, kw_only=True)
class Mend:
    """Settings that make a run fit, and what a worker then needs."""

    settings: tuple[str, ...]
    memory: Memory


MemoryOf = Callable[[Needs], Memory]


def needs_of(run: TrainRun, config: PretrainedConfig, world_size: int, *, compiled: bool) -> Needs:
    """Where activation checkpointing is auto, as if there were none."""
    asked = run.train.activation_checkpointing
    return Needs(
        parameters=count_parameters(config, run.adapter, trust_remote_code=run.model.trust_remote_code),
        dropout=isinstance(run.adapter, LoRA) and run.adapter.dropout > 0,
        quantization=run.quantization.name,
        strategy=run.strategy,
        world_size=world_size,
        micro_batch_size=run.train.micro_batch_size,
        max_length=run.data.max_length,
        checkpointing="none" if asked == "auto" else asked,
        compiled=compiled,
        reference=run.stage.reference if isinstance(run.stage, DPO | KTO) else "none",
        reference_parameters=_reference_parameters(run, config),
    )


def _reference_parameters(run: TrainRun, config: PretrainedConfig) -> int:
    if not isinstance(run.stage, DPO | KTO) or (run.stage.reference_model is None and run.stage.reference_adapter is None):
        return 0
    path, trusted = run.stage.reference_model, run.model.trust_remote_code
    found = config if path is None else load_config(path, {}, trust_remote_code=trusted)
    return count_parameters(found, NoAdapter(name="none"), trust_remote_code=trusted).total


def estimate(run: TrainRun, config: PretrainedConfig, needs: Needs) -> Memory:
    """The peak of a step on one GPU."""
    dtype = DTYPES.get(run.train.precision, torch.bfloat16)  # what auto is on the GPUs that this is for
    backend = attention.backend_to_expect(run.model.attention, config, dtype)
    states_of = partial(
        STATES[needs.strategy.name],
        compute=dtype.itemsize,
        world=needs.world_size,
        accumulates=run.train.global_batch_size > needs.micro_batch_size * needs.world_size,
        **settings_of(needs.strategy),
    )
    states = states_of(needs.parameters)
    saved = 0 if needs.parameters.frozen == 0 else quantized_bytes(needs.parameters, dtype.itemsize, needs.quantization)
    pack = needs.max_length * KINDS[STAGES[run.stage.name].rows].sides
    memory = memory_per_gpu(
        dimensions(config),
        needs.parameters,
        replace(states, weights=states.weights - saved),
        compute=dtype.itemsize,
        tokens=needs.micro_batch_size * pack,
        dropout=needs.dropout,
        kept=KEPT[needs.checkpointing],
        inputs_leave=needs.checkpointing == "offload",
        compiled=needs.compiled,
        mask_bytes=needs.micro_batch_size * pack**2 * (1 + dtype.itemsize) if backend in TAKES_MASK else 0,
    )
    other = needs.reference_parameters * dtype.itemsize
    if needs.reference == "precomputed":
        # Gone before the first step, in whose room it was, but for the logits that the pass has too.
        return replace(memory, reference=max(other - (memory.total - memory.weights - memory.logits), 0))
    if needs.reference == "online" and not other and not _starts_from_its_base(run, needs):
        other = 2 * states_of(replace(needs.parameters, total=needs.parameters.trained)).weights
    return replace(memory, reference=other)


def _starts_from_its_base(run: TrainRun, needs: Needs) -> bool:
    """The reference is the model without its adapter, so that no copy of it is needed."""
    return needs.parameters.frozen > 0 and not (isinstance(run.adapter, LoRA) and run.adapter.path is not None)


def least_recomputation(needs: Needs, memory_of: MemoryOf, usable_bytes: float) -> Needs:
    """With the first of none, selective, full and offload that fits; with the last where none does."""
    possible = [replace(needs, checkpointing=name) for name in KEPT if needs.compiled or name not in COMPILED_ONLY]
    return next((needs for needs in possible if memory_of(needs).total <= usable_bytes), possible[-1])


def mends(run: TrainRun, config: PretrainedConfig, needs: Needs, usable_bytes: float) -> tuple[Mend, ...]:
    """Every set of changes with which a worker's peak is at most `usable_bytes`, and of which no part would do."""
    changes = _changes(run, config, needs)
    found: list[Mend] = []
    for chosen in chain.from_iterable(combinations(changes, size) for size in range(1, len(changes) + 1)):
        changed = _merged([changes[setting] for setting in chosen])
        if changed is None or any(set(mend.settings) < set(chosen) for mend in found):
            continue
        memory = estimate(run, config, replace(needs, **changed))
        if memory.total <= usable_bytes:
            found.append(Mend(settings=chosen, memory=memory))
    return tuple(found)


def ran_out(run: TrainRun, config: PretrainedConfig, needs: Needs, *, during: str, taken: int, total: int) -> ResourceError:
    """Of a GPU with `total` bytes: where, how much was expected, how much had been allocated, and what would make it fit."""
    expected = estimate(run, config, needs).total
    # What went wrong with the estimate goes wrong with those of the remedies too.
    usable = USABLE * total / max(taken / expected, 1.0)
    found = mends(run, config, needs, usable)
    remedies = [f"{' '.join(mend.settings)} (about {mend.memory.total / GIB:.1f} GiB)" for mend in found[:REMEDIES]]
    remedies = remedies or [f"a smaller data.max_length than {run.data.max_length}"]
    return ResourceError(
        f"out of GPU memory during {during}: the estimate was {expected / GIB:.1f} GiB, {taken / GIB:.1f} GiB "
        f"of {total / GIB:.1f} GiB were allocated when more was asked for",
        f"Take {', or '.join(remedies)}.",
    )


def _changes(run: TrainRun, config: PretrainedConfig, needs: Needs) -> dict[str, dict[str, Any]]:
    """What lowers the need: as written on the command line -> as it changes the needs."""
    changes: dict[str, dict[str, Any]] = {}
    if KEPT[needs.checkpointing] > 0:
        changes["train.activation_checkpointing=full"] = {"checkpointing": "full"}
    if needs.micro_batch_size > 1:
        changes["train.micro_batch_size=1"] = {"micro_batch_size": 1}
    if needs.strategy.name == "ddp":
        fsdp = FSDP(name="fsdp", reshard="full", shard_workers="all", prefetch=1, offload=False)
        workers = max(needs.world_size, MIN_SHARDS)
        setting = "strategy=fsdp" + ("" if workers == needs.world_size else f" resources.num_workers={workers}")
        changes[setting] = {"strategy": fsdp, "world_size": workers, "quantization": "none"}
    if needs.parameters.frozen == 0:
        changes["adapter=lora"] = {"parameters": _count(run, config, TRIAL_LORA), "quantization": "none"}
    elif needs.quantization != "bnb_nf4" and needs.strategy.name == "ddp":
        changes["quantization=bnb_nf4"] = {"quantization": "bnb_nf4", "strategy": DDP(name="ddp")}
    if needs.reference == "online" and not run.data.streaming:
        changes["stage.reference=precomputed"] = {"reference": "precomputed"}
    return changes


def _merged(changes: list[dict[str, Any]]) -> Mapping[str, Any] | None:
    """None where two of them disagree."""
    merged: dict[str, Any] = {}
    for change in changes:
        if any(merged.get(name, value) != value for name, value in change.items()):
            return None
        merged |= change
    return merged


def _count(run: TrainRun, config: PretrainedConfig, adapter: AdapterConfig) -> Parameters:
    return count_parameters(config, adapter, trust_remote_code=run.model.trust_remote_code)

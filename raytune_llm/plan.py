"""What a run would be, without running it: its data, its steps, its parameters, its memory, and what would not fit."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from raytune_llm.config.adapter import AdapterConfig, LoRA
from raytune_llm.config.run import TrainRun
from raytune_llm.config.strategy import FSDP, StrategyConfig
from raytune_llm.data.loader import split_sources
from raytune_llm.data.pipeline import find_stores
from raytune_llm.data.store import Store
from raytune_llm.data.tokenizer import run_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.models import attention
from raytune_llm.models.memory import STATES, Memory, Parameters, count_parameters, dimensions, memory_per_gpu
from raytune_llm.models.policy import DTYPES, run_config
from raytune_llm.stages import STAGES
from raytune_llm.train.worker import open_stores, total_steps

GIB = 2**30
USABLE = 0.92
"""Of a device's memory: the rest goes to the CUDA context, to libraries, and to gaps between blocks."""
GPU_CLASSES = (24 * GIB, 40 * GIB, 80 * GIB)
"""Bytes of usual GPUs, to compare with where there is none."""
MIN_SHARDS = 8
"""Sharding is tried over so many workers where the run has fewer."""
TRIAL_LORA = LoRA(name="lora", rank=8, alpha=16.0, dropout=0.0, targets="all-linear", path=None)
KEPT = {"none": 1.0, "selective": 0.5, "full": 0.0}
"""By train.activation_checkpointing: the part of its activations that a layer keeps for the backward pass."""
TAKES_MASK = {"varlen": False, "sdpa": True}
"""Whether an attention back end is given a mask of every pair of positions."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The token store of a run, as training would go through it."""

    store: Path
    rows: int
    """That are trained on."""
    held_out_rows: int
    samples: int
    """Packs, or rows without packing."""
    tokens: int
    """In an epoch, padding left out."""
    trained_tokens: int
    fill: float | None
    """Part of the packs that holds tokens; none without packing."""
    steps_per_epoch: int
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    memory: int
    """Bytes."""
    shared: bool = False
    """By all workers, as a host's memory is; a GPU is one worker's."""

    def share(self, memory: Memory, world_size: int) -> float:
        """The part of the device that a run needs."""
        return memory.total * (world_size if self.shared else 1) / self.memory


@dataclass(frozen=True, kw_only=True)
class Mend:
    """Settings that make a run fit, and what a worker then needs."""

    settings: tuple[str, ...]
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A device that is too small for the run, and the sets of changes with which it would do, none of them needlessly large."""

    device: Device
    mends: tuple[Mend, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    world_size: int
    accumulation: int
    """Micro-batches of a worker in one step."""
    parameters: Parameters
    data: Data | None
    """None until the data are prepared: before that, neither steps nor tokens are known."""
    memory: Memory
    """The peak on one GPU."""
    devices: tuple[Device, ...]
    """The GPUs here; without any, this machine where the run would take place on it, and GPUs of usual sizes."""
    misfits: tuple[Misfit, ...]


def plan(run: TrainRun) -> Plan:
    """Raises ConfigError and DataError as training would, without loading weights or reading more of the data than its hash."""
    tokenizer, _ = run_tokenizer(run.model, run.data, needs_template=STAGES[run.stage.name].rows != "text")
    config = run_config(run.model, tokenizer, run.data.max_length)
    gpus = gpus_here()
    world_size = _world_size(run, len(gpus))
    accumulation = _accumulation(run, world_size)
    count = partial(count_parameters, config, trust_remote_code=run.model.trust_remote_code)
    memory_of = partial(_memory, run, config)
    needs = Needs(
        parameters=count(run.adapter),
        dropout=isinstance(run.adapter, LoRA) and run.adapter.dropout > 0,
        strategy=run.strategy,
        world_size=world_size,
        micro_batch_size=run.train.micro_batch_size,
        kept=KEPT[run.train.activation_checkpointing],
    )
    memory = memory_of(needs)
    devices = tuple(dict.fromkeys(gpus)) or tuple(_devices_without_gpu(run))
    too_small = [device for device in devices if device.share(memory, world_size) > USABLE]
    changes = _changes(needs, count) if too_small else {}
    return Plan(
        world_size=world_size,
        accumulation=accumulation,
        parameters=needs.parameters,
        data=_data(run),
        memory=memory,
        devices=devices,
        misfits=tuple(Misfit(device=device, mends=_mends(device, needs, changes, memory_of)) for device in too_small),
    )


def gpus_here() -> list[Device]:
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Device(name=gpu.name, memory=gpu.total_memory) for gpu in found]


def host_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _devices_without_gpu(run: TrainRun) -> Iterator[Device]:
    if run.resources.name != "cluster":
        yield Device(name="this machine, without a GPU", memory=host_memory(), shared=True)
    yield from (Device(name="a GPU", memory=memory) for memory in GPU_CLASSES)


def _world_size(run: TrainRun, num_gpus: int) -> int:
    workers = run.resources.num_workers
    return workers if isinstance(workers, int) else max(num_gpus, 1)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What memory depends on and a user might change."""

    parameters: Parameters
    dropout: bool
    strategy: StrategyConfig
    world_size: int
    micro_batch_size: int
    kept: float
    """The part of its activations that a layer does not compute again."""


def _accumulation(run: TrainRun, world_size: int) -> int:
    together = run.train.micro_batch_size * world_size
    if run.train.global_batch_size % together:
        raise ConfigError(
            "train.global_batch_size",
            f"must be a multiple of train.micro_batch_size x {world_size} workers = {together}",
            got=run.train.global_batch_size,
            remedy=f"Take {-(-run.train.global_batch_size // together) * together}, or set resources.num_workers.",
        )
    return run.train.global_batch_size // together


def _memory(run: TrainRun, config: PretrainedConfig, needs: Needs) -> Memory:
    dtype = DTYPES.get(run.train.precision, torch.bfloat16)  # what auto is on the GPUs that a plan is for
    backend, _ = attention.choose(run.model.attention, torch.device("cuda"), dtype)
    strategy = asdict(needs.strategy)  # type: ignore[call-overload]
    states = STATES[strategy.pop("name")](
        needs.parameters,
        dtype.itemsize,
        needs.world_size,
        accumulates=run.train.global_batch_size > needs.micro_batch_size * needs.world_size,
        **strategy,
    )
    pairs = needs.micro_batch_size * run.data.max_length**2
    return memory_per_gpu(
        dimensions(config),
        needs.parameters,
        states,
        compute=dtype.itemsize,
        tokens=needs.micro_batch_size * run.data.max_length,
        dropout=needs.dropout,
        kept=needs.kept,
        compiled=run.train.compile,
        mask_bytes=pairs * (1 + dtype.itemsize) if TAKES_MASK[backend] else 0,
    )


def _changes(needs: Needs, count: Callable[[AdapterConfig], Parameters]) -> dict[str, dict[str, Any]]:
    """What lowers the need: as written on the command line -> as it changes the needs."""
    changes: dict[str, dict[str, Any]] = {}
    if needs.kept > KEPT["full"]:
        changes["train.activation_checkpointing=full"] = {"kept": KEPT["full"]}
    if needs.micro_batch_size > 1:
        changes["train.micro_batch_size=1"] = {"micro_batch_size": 1}
    if needs.strategy.name == "ddp":
        fsdp = FSDP(name="fsdp", reshard=True, offload=False)
        workers = max(needs.world_size, MIN_SHARDS)
        setting = "strategy=fsdp" + ("" if workers == needs.world_size else f" resources.num_workers={workers}")
        changes[setting] = {"strategy": fsdp, "world_size": workers}
    if needs.parameters.frozen == 0:
        changes["adapter=lora"] = {"parameters": count(TRIAL_LORA)}
    return changes


def _mends(
    device: Device, needs: Needs, changes: Mapping[str, dict[str, Any]], memory_of: Callable[[Needs], Memory]
) -> tuple[Mend, ...]:
    """Every set of changes that makes the run fit on the device, and of which no part would."""
    mends: list[Mend] = []
    for chosen in chain.from_iterable(combinations(changes, size) for size in range(1, len(changes) + 1)):
        changed = replace(needs, **ChainMap(*(changes[setting] for setting in chosen)))
        memory = memory_of(changed)
        more_than_enough = any(set(mend.settings) < set(chosen) for mend in mends)
        if not more_than_enough and device.share(memory, changed.world_size) <= USABLE:
            mends.append(Mend(settings=chosen, memory=memory))
    return tuple(mends)


def _data(run: TrainRun) -> Data | None:
    store, eval_store = find_stores(run.model, run.data, kind=STAGES[run.stage.name].rows)
    if store is None or (eval_store is None and (run.data.eval_path or run.data.eval_names)):
        return None
    stores = open_stores(run, str(store), None if eval_store is None else str(eval_store))
    samples = stores.train
    trained_rows, _ = split_sources(Store.open(store), run.data.eval_fraction, run.train.seed)
    tokens = int(samples.tokens.sum())
    steps_per_epoch = -(-len(samples) // run.train.global_batch_size)
    return Data(
        store=store,
        rows=len(trained_rows),
        held_out_rows=sum(len(samples.rows) for samples in stores.held_out.values()),
        samples=len(samples),
        tokens=tokens,
        trained_tokens=int(samples.targets.sum()),
        fill=tokens / (len(samples) * run.data.max_length) if run.data.packing else None,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps(run, steps_per_epoch),
    )

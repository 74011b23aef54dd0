"""The plan of a run, without running it: data, steps, parameters, memory, and what would not fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from raytune_llm.config.resources import on_cluster
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import find_stores
from raytune_llm.data.samples import Samples, split_sources
from raytune_llm.data.store import Store
from raytune_llm.memory.fixes import Fix, SuggestedFixes
from raytune_llm.memory.footprint import GIB, USABLE, estimate, least_recomputation, needs_of, parameters_of
from raytune_llm.memory.model import Memory, Parameters
from raytune_llm.models.activations import compiles
from raytune_llm.models.attention import case_of
from raytune_llm.models.build import DTYPES, compute_dtype, run_config
from raytune_llm.runs.build import computes_first_once
from raytune_llm.runs.stores import held_out_part, open_stores, shares_prompts, total_steps
from raytune_llm.runs.tokenizer import tokenizer_of

CPU = torch.device("cpu")
UNKNOWN = sys.maxsize
"""Before the data are prepared: as many batches as there is room for."""
GPU_CLASSES = (24 * GIB, 40 * GIB, 80 * GIB)
"""Memory of common GPUs in bytes, for machines without a GPU."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The amount of data that a run trains on, from its token store."""

    store: Path
    rows: int
    """Rows in the train split."""
    held_out_rows: int
    samples: int
    """Packs, or rows without packing."""
    tokens: int
    """Tokens in an epoch, without padding."""
    trained_tokens: int
    fill: float | None
    """Fraction of the packs that is not padding. None: without packing."""
    steps_per_epoch: int
    total_steps: int
    held_out_samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    memory: int
    """Bytes."""
    shared: bool = False
    """Whether all workers share this memory, as on a host without GPUs."""

    def share(self, memory: Memory, world_size: int) -> float:
        """The fraction of the device's memory that a run needs."""
        return memory.total * (world_size if self.shared else 1) / self.memory


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a run fits on a device, and how."""

    device: Device
    checkpointing: str
    """train.activation_checkpointing, or the choice of auto for this device."""
    memory: Memory
    """The peak memory of one worker."""
    fixes: tuple[Fix, ...]
    """If it does not fit: sets of changes with which it would, each minimal."""
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    world_size: int
    accumulation: int
    """Micro-batches of a worker in one step."""
    parameters: Parameters
    saved_bytes: int
    """Size of the weights in final/: float32 for an adapter, the compute dtype for a model."""
    data: Data | None
    """None until the data are prepared: before that, neither steps nor tokens are known."""
    verdicts: tuple[Verdict, ...]
    """For the GPUs of this machine; if it has none, for the machine itself (if the run would be on it) and for common GPUs."""

    @property
    def least_operations(self) -> float | None:
        """FLOPs of products of matrices that training takes at least, on all workers together; attention's own are left out. None
        before the data are prepared."""
        if self.data is None:
            return None
        known = self.memory.known > 0
        of_epoch = self.parameters.operations.at_least(self.data.tokens, self.data.trained_tokens, first_layers_known=known)
        return of_epoch * self.data.total_steps / max(self.data.steps_per_epoch, 1)

    @property
    def memory(self) -> Memory:
        """The peak of one worker on the first device."""
        return self.verdicts[0].memory

    @property
    def misfits(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if not verdict.fits)


def plan(run: TrainRun, *, in_sweep: bool = False) -> Plan:
    """Plan a run. Raises ConfigError and DataError as training would. It loads no weights, and reads the data only to hash
    them. in_sweep: other trials train over the same base in the same process."""
    tokenizer, _ = tokenizer_of(run)
    config = run_config(run.model, tokenizer, run.data.max_length, packing=run.data.packing)
    gpus = gpus_here()
    world_size = _world_size(run, len(gpus))
    accumulation = run.train.micro_batches(world_size)
    devices = tuple(dict.fromkeys(gpus)) or tuple(_devices_without_gpu(run))
    parameters = parameters_of(run, config)
    data = _data(run, config)
    known = _known_batches(run, data, world_size, accumulation, comes_again=in_sweep or run.train.epochs > 1)
    computed = DTYPES.get(run.train.precision, torch.bfloat16) if run.adapter.trains_base else torch.float32
    return Plan(
        world_size=world_size,
        accumulation=accumulation,
        parameters=parameters,
        saved_bytes=parameters.saved * computed.itemsize,
        data=data,
        verdicts=tuple(_verdict(run, config, device, world_size, known) for device in devices),
    )


def _verdict(run: TrainRun, config: PretrainedConfig, device: Device, world_size: int, known_batches: tuple[int, int]) -> Verdict:
    memory_of = partial(estimate, run, config)
    usable = USABLE * device.memory / (world_size if device.shared else 1)
    device_type = "cpu" if device.shared else "cuda"
    compiled, _ = compiles(run.train.compile, device_type, never=run.uncompiled)
    here = case_of(config, "cpu", (0, 0), compute_dtype(run.train.precision, CPU)) if device.shared else None
    needs = needs_of(run, config, world_size, compiled=compiled, case=here)
    if needs.parameters.known_first and computes_first_once(run, device_type, compiled=compiled):
        needs = replace(needs, known_batches=known_batches)
    if run.train.activation_checkpointing == "auto" and not device.shared:
        needs = least_recomputation(needs, memory_of, usable)
    memory = memory_of(needs)
    fits = memory.total <= usable
    return Verdict(
        device=device,
        checkpointing=needs.checkpointing,
        memory=memory,
        fixes=() if fits else SuggestedFixes(run, config, needs, usable, on_gpu=not device.shared).least(),
        fits=fits,
    )


def _known_batches(run: TrainRun, data: Data | None, world_size: int, accumulation: int, *, comes_again: bool) -> tuple[int, int]:
    """The different micro-batches of a worker that are trained on, and others: held-out ones, and those of a reference.
    comes_again: those that are trained on are trained on again."""
    if data is None:
        trained = UNKNOWN if run.train.max_steps is None else run.train.max_steps * accumulation
        return (trained if comes_again else 0, UNKNOWN if run.data.evaluates or run.stage.has_reference else 0)
    micro = run.train.micro_batch_size
    trained = data.total_steps * accumulation
    if micro == 1:  # larger ones are of other samples in each epoch
        trained = min(trained, data.samples)
    held_out = -(-data.held_out_samples // (micro * world_size))
    own_reference = run.stage.has_reference and run.stage.reference_model is None and run.stage.reference_adapter is None
    return (trained if comes_again else 0, held_out + (trained if own_reference else 0))


def gpus_here() -> list[Device]:
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Device(name=gpu.name, memory=gpu.total_memory) for gpu in found]


def host_memory() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _devices_without_gpu(run: TrainRun) -> Iterator[Device]:
    if not on_cluster(run.resources):
        yield Device(name="this machine, without a GPU", memory=host_memory(), shared=True)
    yield from (Device(name="a GPU", memory=memory) for memory in GPU_CLASSES)


def _world_size(run: TrainRun, num_gpus: int) -> int:
    workers = run.resources.num_workers
    if isinstance(workers, list):
        return workers[0]  # an elastic run's smallest group, whose workers need the most memory
    return workers if isinstance(workers, int) else max(num_gpus, 1)


def _data(run: TrainRun, config: PretrainedConfig) -> Data | None:
    if run.data.streaming:
        return None
    store, eval_store = find_stores(run.model, run.data, kind=run.stage.kind)
    if store is None or (eval_store is None and (run.data.eval_path or run.data.eval_split or run.data.eval_names)):
        return None
    shares = shares_prompts(run, run.stage.kind, lambda: config)
    stores = open_stores(run, str(store), None if eval_store is None else str(eval_store), share_prompts=shares)
    samples = stores.train
    assert isinstance(samples, Samples)
    trained_rows, _ = split_sources(found := Store.open(store), held_out_part(run.data, found), run.train.seed)
    tokens = int(samples.tokens.sum())
    steps_per_epoch = -(-len(samples) // run.train.global_batch_size)
    return Data(
        store=store,
        rows=len(trained_rows),
        held_out_rows=sum(len(samples.rows) for samples in stores.held_out.values()),
        samples=len(samples),
        tokens=tokens,
        trained_tokens=samples.trained_tokens,
        fill=tokens / (len(samples) * samples.capacity) if run.data.packing else None,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps(run, steps_per_epoch),
        held_out_samples=sum(map(len, stores.held_out.values())),
    )

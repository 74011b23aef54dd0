"""Builds the model of a run on a worker, sharded by its strategy, and makes the automatic choices."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from raytune_llm.byte_size import in_units
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.memory.fixes import held_by_others, ran_out
from raytune_llm.memory.flops import Operations, operations
from raytune_llm.memory.footprint import USABLE, Needs, estimate, least_recomputation, needs_of, needs_together
from raytune_llm.models import quantization
from raytune_llm.models.activations import compiles, lacks_for_compiling
from raytune_llm.models.adapters import OWN, Slots, other_base
from raytune_llm.models.attention import capability_of, case_of
from raytune_llm.models.build import ForTraining, build_policy, choose_precision, precision_name, predicts_more
from raytune_llm.models.layers import layers
from raytune_llm.models.load import files_to_read
from raytune_llm.models.policy import Policy
from raytune_llm.models.quantization import prequantized
from raytune_llm.models.shared import SharedModel
from raytune_llm.models.stored import Files
from raytune_llm.packaged import cache_dir
from raytune_llm.stages import STAGES
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.strategies import FIRST_LOADS, READS_FILES, spread
from raytune_llm.train.strategies.base import Strategy, Training


@dataclass(frozen=True, kw_only=True)
class Built:
    policy: Policy
    strategy: Strategy
    operations: Operations
    choices: tuple[str, ...]
    """Automatic choices and their reasons, one line each."""
    adapter: str = OWN
    """Name of the adapter that the run trains, if it trains one."""


def least_usable_bytes(device: torch.device) -> float:
    """Bytes of GPU memory that a run can use: the minimum over workers, so that all choose alike; infinite without a GPU. A
    collective call."""
    if device.type != "cuda":
        return math.inf
    free = torch.cuda.get_device_properties(device).total_memory - held_by_others(device)
    if dist.is_initialized():
        least = torch.tensor(free, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        free = int(least.item())
    return USABLE * free


def computes_first_once(run: TrainRun, device_type: str, *, compiled: bool) -> bool:
    """Whether a worker computes layers before the first trained one once for each batch, where the model has such layers."""
    return device_type == "cpu" and not (compiled or _spreads(run))


def _spreads(run: TrainRun) -> bool:
    """Whether a worker may have a part of the weights only."""
    return READS_FILES[run.strategy.name] or FIRST_LOADS[run.strategy.name]


class Builder:
    """Builds a run's model on one worker. It keeps the memory estimate for the error that is raised if memory runs out.

    Its constructor, `build` and `policy` are collective calls. Its other attributes are not, so that a single worker whose memory
    runs out can report it.
    """

    def __init__(
        self,
        run: TrainRun,
        config: PretrainedConfig,
        device: torch.device,
        first_pieces: Mapping[int, Sequence[int]] = MappingProxyType({}),
        shared: SharedModel | None = None,
        *,
        together: Sequence[TrainRun] = (),
    ) -> None:
        """first_pieces: for each token that the run adds, the token ids whose mean its embedding starts from. shared: keeps the
        base for the next run. together: the runs that train on one base in one pass, `run` included."""
        self.run, self.config, self.device, self._first_pieces = run, config, device, first_pieces
        self._shared = None if _spreads(run) or run.quantization.replaces_layers else shared
        self._together = together
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.compiled, self._why_compiled = compiles(
            run.train.compile, device.type, never=run.uncompiled or self._uncompiled, lacking=lacks_for_compiling(device)
        )
        self._auto = run.train.activation_checkpointing == "auto"
        self._set_environment()
        self.usable_bytes = least_usable_bytes(device)
        """GPU memory for the run, the minimum over workers; infinite without a GPU."""

    def build(self) -> Built:
        policy, counted, choices = self.policy()
        run = self.run
        build = partial(build_optimizer, run.optimizer, lr_factor=policy.adapters.lr_factor)
        training = Training(self.device, policy.compute, run.train.max_grad_norm, layerwise=run.optimizer.layerwise)
        strategy = spread(run.strategy, policy, build, training)
        return Built(policy=policy, strategy=strategy, operations=counted, choices=choices)

    def policy(self) -> tuple[Policy, Operations, tuple[str, ...]]:
        """The model, its operations, and the automatic choices. For several runs, the model has a bank of empty adapter slots."""
        run, device = self.run, self.device
        compute, why_precision = choose_precision(run.train.precision, device)
        checkpointing, why = self._checkpointing()
        files = self._files()
        training = ForTraining(
            adapter_seed=run.train.adapter_seed,
            slots=Slots(tuple(one.adapter for one in self._together)) if self._together else None,
            compile_layers=self.compiled,
            cuda_graphs=self._captures,
            activation_checkpointing=checkpointing,
            starts_once=computes_first_once(run, device.type, compiled=self.compiled) and not self._together,
            trains_again=run.train.epochs > 1 or self._shared is not None,
        )
        policy, attention = build_policy(
            self.config,
            run.model,
            run.adapter,
            compute=compute,
            seed=run.train.seed,
            device=self._loads_to(files),
            files=files,
            runs_on=device,
            quantization=run.quantization,
            scores=not run.stage.writes,
            separate_head=STAGES[run.stage.name].objective(run.stage).separate_head,
            training=training,
            first_pieces=self._first_pieces,
            shared=self._shared,
        )
        compiled = "layers compiled" if self.compiled else "layers not compiled"
        adapters = policy.adapters.described(device.type)
        quantized = quantization.described(layers(policy), run.quantization)
        grows, scores = bool(self._first_pieces), not run.stage.writes
        more = predicts_more(self.config, run.model, run.adapter, scores=scores, grows=grows)
        choices = (
            f"precision: {precision_name(compute)} ({why_precision})",
            attention,
            *([] if (came := prequantized.described(self.config)) is None else [f"weights: {came}"]),
            *([] if quantized is None else [f"quantization: {quantized}"]),
            f"compilation: {compiled} ({self._why_compiled})",
            f"activation checkpointing: {checkpointing} ({why})",
            *([f"CUDA graphs: {self._uncompiled or 'of the layers'} (asked for)"] if self._captures else []),
            *([] if policy.frozen_start is None else [f"layers: {policy.frozen_start}"]),
            *([] if adapters is None else [f"adapters: {adapters}"]),
            *([] if more is None or (said := more.described()) is None else [said]),
            *self._other_bases(),
        )
        return policy, operations(policy, self.config), choices

    @property
    def fits(self) -> bool:
        """Whether the estimate fits the GPU. True without a GPU."""
        return self.estimated_bytes <= self.usable_bytes

    @property
    def estimated_bytes(self) -> float:
        """The estimate of a step's peak."""
        return self._memory_of(self.needs).total

    def out_of_memory(self, error: torch.OutOfMemoryError, during: str) -> ResourceError:
        """The error for the user. The first note of `error` names the innermost phase in which memory ran out."""
        return ran_out(
            self.run,
            self.config,
            self.needs,
            during=next(iter(getattr(error, "__notes__", ())), during),
            taken=torch.cuda.max_memory_allocated(self.device),
            total=torch.cuda.get_device_properties(self.device).total_memory,
            others=held_by_others(self.device),
        )

    @cached_property
    def needs(self) -> Needs:
        compute, _ = choose_precision(self.run.train.precision, self.device)
        case = case_of(self.config, self.device.type, capability_of(self.device), compute)
        needs = needs_of(self.run, self.config, self.world, compiled=self.compiled, case=case)
        fewer: list[Needs] = []
        if runs := len(self._together):
            counts = [runs // part for part in (1, 2, 4, 8, 16) if runs >= part]
            needs, *fewer = [needs_together(needs, runs, at_once) for at_once in counts]
        return least_recomputation(needs, self._memory_of, self.usable_bytes, fewer) if self._auto else needs

    @property
    def at_once(self) -> int:
        """How many runs share a pass: all of them, or as many as fit in memory without activation checkpointing, if any do."""
        return self.needs.micro_batch_size // self.run.train.micro_batch_size

    def _set_environment(self) -> None:
        """Set environment variables that libraries read when they first use the device or compile."""
        if self.device.type == "cpu":
            # transformers imports DeepSpeed, if it is installed, to save any model; this avoids its warning on a host without GPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if self.device.type == "cuda":
            # Memory segments that grow in place, so that changing sizes leave no gaps. Host memory is page-locked by several
            # threads, after they touched it: CUDA alone takes longer, and meanwhile no kernel starts. torch reads this at the
            # first allocation.
            settings = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", settings)
        if self.compiled:
            # The default folder is in /tmp, which a restart of the machine empties.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))

    @property
    def _captures(self) -> bool:
        if not self.run.train.cuda_graphs:
            return False
        lacking = (
            "there is no GPU" if self.device.type != "cuda" else f"there are {self.world} workers" if self.world > 1 else None
        )
        if lacking is not None:
            raise ConfigError("train.cuda_graphs", f"can't be true here: {lacking}", got=True, fix="Set train.cuda_graphs=false.")
        return True

    @property
    def _uncompiled(self) -> str | None:
        drops = any(one.adapter.dropout for one in self._together)
        return "dropout of several adapters draws from generators of their own" if drops else None

    @property
    def _memory_of(self) -> Callable:
        return partial(estimate, self.run, self.config)

    def _checkpointing(self) -> tuple[str, str]:
        if not self._auto:
            asked = self.run.train.activation_checkpointing
            if asked == "offload" and self.device.type != "cuda":
                return "full", "instead of offload, since there is no other memory"
            return asked, "asked for"
        if self.device.type != "cuda":
            return "none", "not on a CPU"
        expected = self._memory_of(self.needs).total
        fits = f"an estimated {in_units(expected)} of {in_units(self.usable_bytes)} usable"
        return (
            self.needs.checkpointing,
            f"the least that fits: {fits}" if expected <= self.usable_bytes else f"nothing fits: {fits}",
        )

    def _other_bases(self) -> Iterator[str]:
        """Warnings about saved adapters that were trained on another model."""
        model, continued = self.run.model, self.run.adapter.path
        for number, path in enumerate(model.merged_adapters):
            under = replace(model, merged_adapters=model.merged_adapters[:number])
            if (said := other_base(path, "model.merged_adapters", under.base_name)) is not None:
                yield said
        if continued is not None and (said := other_base(continued, "adapter.path", model.base_name)) is not None:
            yield said

    def _files(self) -> Files | None:
        """The files of the weights, if each worker reads its own part: it keeps a shard or fewer bits, and can see the files."""
        run = self.run
        reads = READS_FILES[run.strategy.name]
        keeps_less = reads or run.quantization.replaces_layers
        if self._first_pieces or run.adapter.changes_base or run.model.merged_adapters:
            return None  # the files lack rows of new tokens, or changes by merged adapters
        if not keeps_less or run.model.weights != "pretrained" or run.model.path is None:
            return None
        files = files_to_read(
            self.config,
            run.model.path,
            revision=run.model.revision,
            trust_remote_code=run.model.trust_remote_code,
            scores=not run.stage.writes,
        )
        if not reads:
            return files
        seen = torch.tensor(files is not None, dtype=torch.int32, device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MIN)
        return files if seen.item() else None

    def _loads_to(self, files: Files | None) -> torch.device:
        """The device that weights are loaded to: meta if the strategy reads them from files or gets them from rank 0, whose
        weights are in host memory. Quantized weights are made on every worker."""
        if self.run.quantization.replaces_layers and not self.run.adapter.trains_base:
            return self.device
        if files is not None and READS_FILES[self.run.strategy.name]:
            return torch.device("meta")
        if not FIRST_LOADS[self.run.strategy.name]:
            return self.device
        if self.rank != 0:
            return torch.device("meta")
        return torch.device("cpu") if self.run.model.weights == "pretrained" else self.device

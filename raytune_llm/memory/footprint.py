"""Estimates the memory that a run needs on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from raytune_llm.config.adapter import NoAdapter
from raytune_llm.config.optimizer import GRADIENTS_AT_ONCE, OptimizerConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.run import TrainRun
from raytune_llm.config.section import settings_of
from raytune_llm.config.strategy import StrategyConfig
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.tokens.tokenizer import first_pieces, run_tokenizer
from raytune_llm.memory.model import (
    FP32,
    NO_PIECES,
    STATES,
    Memory,
    Parameters,
    count_parameters,
    dimensions,
    memory_per_gpu,
    quantized_bytes,
)
from raytune_llm.models import attention
from raytune_llm.models.activations import CHECKPOINTING
from raytune_llm.models.adapters import Kept, kept_by
from raytune_llm.models.build import DTYPES
from raytune_llm.models.frozen_start import kept_bytes
from raytune_llm.models.load import load_config
from raytune_llm.models.quantization import quantization_of

GIB = 2**30
USABLE = 0.92
"""The usable fraction of a device's memory. The CUDA context, libraries and gaps between blocks take the rest."""
TAKES_MASK = {"sdpa"}
"""Attention back ends that need a mask over all pairs of positions."""
HOPPER = (9, 0)
WORKSPACE, SMALL_WORKSPACE = 32 * 2**20, 8 * 2**20
"""What torch gives cuBLAS in each of two threads, of the forward and of the backward pass: since Hopper GPUs, and before."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The properties of a run that its memory depends on."""

    parameters: Parameters
    dropout: bool
    """Adapted layers have dropout on their inputs."""
    adapter: Kept
    quantization: QuantizationConfig
    optimizer: OptimizerConfig
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
    """The parameters of a reference model other than the trained one."""
    case: attention.Case
    """The device type, capability and compute type."""
    known_batches: tuple[int, int] = (0, 0)
    """The numbers of micro-batches, trained and held out, for which a worker caches the output of frozen first layers."""


MemoryOf = Callable[[Needs], Memory]


def needs_of(
    run: TrainRun, config: PretrainedConfig, world_size: int, *, compiled: bool, case: attention.Case | None = None
) -> Needs:
    """The needs of a run. Activation checkpointing counts as none if it is auto. case: the device; by default a Hopper GPU
    (sm_90)."""
    return Needs(
        parameters=parameters_of(run, config),
        world_size=world_size,
        compiled=compiled,
        reference_parameters=_reference_parameters(run, config),
        case=case or attention.case_of(config, "cuda", (9, 0), DTYPES.get(run.train.precision, torch.bfloat16)),
        **needs_set(run),
    )


def needs_together(needs: Needs, runs: int, at_once: int) -> Needs:
    """The needs of `runs` runs over one base: each has an adapter, and `at_once` of them a micro-batch at the same time."""
    one = needs.parameters
    more = (runs - 1) * one.trained
    parameters = replace(one, total=one.total + more, trained=one.trained + more, trained_shapes=runs * one.trained_shapes)
    return replace(needs, parameters=parameters, micro_batch_size=at_once * needs.micro_batch_size)


def parameters_of(run: TrainRun, config: PretrainedConfig) -> Parameters:
    """The parameters of the run's model with its new tokens, score head and adapter. Raises ConfigError for an adapter or a
    quantization that doesn't fit the model."""
    scores, pieces = not run.stage.writes, NO_PIECES
    if run.model.adds_tokens:
        tokenizer, _ = run_tokenizer(run.model, run.data, needs_template=KINDS[run.stage.kind].renders_chat)
        pieces = first_pieces(run.model, tokenizer)
    trusted = run.model.trust_remote_code
    settings: dict[str, Any] = {"trust_remote_code": trusted, "scores": scores, "first_pieces": pieces}
    return count_parameters(config, run.adapter, quantization=run.quantization, **settings)


def needs_set(run: TrainRun) -> dict[str, Any]:
    """The fields of Needs that follow from settings alone."""
    asked = run.train.activation_checkpointing
    return {
        "dropout": run.adapter.dropout > 0 and kept_by(run.adapter).drops_inputs,
        "adapter": kept_by(run.adapter),
        "quantization": run.quantization,
        "optimizer": run.optimizer,
        "strategy": run.strategy,
        "micro_batch_size": run.train.micro_batch_size,
        "max_length": run.data.max_length,
        "checkpointing": "none" if asked == "auto" else asked,
        "reference": run.stage.reference,
    }


def _reference_parameters(run: TrainRun, config: PretrainedConfig) -> int:
    if run.stage.reference_model is None and run.stage.reference_adapter is None:
        return 0
    path, trusted = run.stage.reference_model, run.model.trust_remote_code
    found = config if path is None else load_config(path, {}, trust_remote_code=trusted)
    return count_parameters(found, NoAdapter(name="none"), trust_remote_code=trusted).total


def estimate(run: TrainRun, config: PretrainedConfig, needs: Needs) -> Memory:
    """The estimated peak memory of a step on one GPU."""
    dtype, backend = needs.case.dtype, attention.expected(run.model.attention, needs.case)
    state = needs.optimizer.state_bytes(needs.parameters.trained_shapes)
    states_of = partial(
        STATES[needs.strategy.name],
        compute=dtype.itemsize,
        world=needs.world_size,
        optimizer_bytes=state.like_weights,
        accumulates=run.train.global_batch_size > needs.micro_batch_size * needs.world_size,
        **settings_of(needs.strategy),
    )
    states = states_of(needs.parameters)
    if needs.optimizer.layerwise:
        sizes = sorted((one.numel for one in needs.parameters.trained_shapes), reverse=True)
        states = replace(states, gradients=min(states.gradients, FP32 * sum(sizes[:GRADIENTS_AT_ONCE])))
    if needs.case.device_type == "cuda":
        workspace = WORKSPACE if needs.case.capability >= HOPPER else SMALL_WORKSPACE
        states = replace(states, buffers=states.buffers + 2 * workspace)
    quantization = quantization_of(needs.quantization)
    saved = quantized_bytes(needs.parameters, dtype.itemsize, quantization)
    saved = round(saved * needs.strategy.weights_share(needs.world_size))
    # Quantized experts are dequantized when their layer reads them, and kept for its backward pass.
    unpacked = 0 if quantization is None else dtype.itemsize * needs.parameters.experts
    pack = needs.max_length * KINDS[run.stage.kind].sides
    tokens, hidden = needs.micro_batch_size * pack, dimensions(config).hidden
    memory = memory_per_gpu(
        dimensions(config),
        needs.parameters,
        replace(states, weights=states.weights - saved, optimizer=states.optimizer + state.whole),
        compute=dtype.itemsize,
        tokens=tokens,
        dropout=needs.dropout,
        adapter=needs.adapter,
        kept=CHECKPOINTING[needs.checkpointing].on_device,
        inputs_leave=CHECKPOINTING[needs.checkpointing].leaves,
        compiled=needs.compiled,
        mask_bytes=needs.micro_batch_size * pack**2 * (1 + dtype.itemsize) if backend in TAKES_MASK else 0,
    )
    kept, num_layers = CHECKPOINTING[needs.checkpointing].on_device, max(dimensions(config).layers, 1)
    in_kept_layers = unpacked * max(num_layers - needs.parameters.frozen_first, 0) // num_layers
    memory = replace(
        memory,
        activations=memory.activations + round(kept * in_kept_layers),
        layer=memory.layer + round((1 - kept) * unpacked / num_layers),
        known=sum(kept_bytes(batches, tokens * hidden * dtype.itemsize) for batches in needs.known_batches),
    )
    other = needs.reference_parameters * dtype.itemsize
    if needs.reference == "precomputed":
        # The reference pass is over before the first step and needs no more memory than a step, except for its logits.
        return replace(memory, reference=max(other - (memory.total - memory.weights - memory.logits), 0))
    if needs.reference == "online" and not other and not run.adapter.starts_at_base:
        other = 2 * states_of(replace(needs.parameters, total=needs.parameters.trained)).weights
    return replace(memory, reference=other)


def least_recomputation(needs: Needs, memory_of: MemoryOf, usable_bytes: float, fewer: Sequence[Needs] = ()) -> Needs:
    """The needs with the first of none, selective, full and offload that fits in usable_bytes; with the last one if none does.
    fewer: other needs to try with each option before the next one."""
    ways = [
        replace(one, checkpointing=name)
        for name, way in CHECKPOINTING.items()
        if way.possible(compiled=needs.compiled)
        for one in (needs, *fewer)
    ]
    return next((needs for needs in ways if memory_of(needs).total <= usable_bytes), ways[-1])

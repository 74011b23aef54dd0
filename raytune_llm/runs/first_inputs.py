"""Initializes a new adapter from the run's first samples, for methods that do so (EVA)."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from raytune_llm.data.batches import to_device
from raytune_llm.data.loader import Loader
from raytune_llm.errors import DataError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models.adapters.protocol import Observer
from raytune_llm.runs.setup import Setup
from raytune_llm.train.strategies.base import Strategy, trained


def begin_from_inputs(setup: Setup) -> None:
    """Observe the layers' inputs on the first samples of the run's order, and initialize the adapter. A collective call.

    Every worker computes the same samples, one per pass, so the values depend neither on the number of workers nor on the
    micro-batch. Raises DataError if no layer saw enough trained tokens.
    """
    strategy = setup.built.strategy
    observer = strategy.module.adapters.observer()
    assert observer is not None, "the section says that it begins from inputs"
    _look(setup, observer)
    values = observer.values()
    if not values:
        problem = f"has fewer trained tokens in {setup.run.adapter.begins_from} samples than twice adapter.rank"
        raise DataError(str(setup.run.data.path), problem, "Raise adapter.rows, or set adapter=lora.")
    _set(strategy, {id(parameter): value for parameter, value in values})


@torch.no_grad()
def _look(setup: Setup, observer: Observer) -> None:
    run, strategy, policy = setup.run, setup.built.strategy, setup.built.strategy.module
    loader = Loader(
        setup.source.samples,
        micro_batch_size=1,
        global_batch_size=1,
        rank=0,
        world_size=1,
        seed=run.train.seed,
        pad_id=setup.source.pad_id,
    )
    reads = (cross_entropy,) if run.stage.writes else ()
    strategy.model.eval()
    with closing(loader.epoch(0)) as steps, policy.adapters.using(None):
        for step in islice(steps, run.adapter.begins_from):
            batch = to_device(step.batches[0], setup.device)
            with observer.watching(batch.trained_N, batch.ids_BT.numel()):
                strategy.model(batch, *reads)
    strategy.model.train()


def _set(strategy: Strategy, values: dict[int, Tensor]) -> None:
    """Set parameters through the strategy's `load`, since some strategies keep a parameter in several places."""
    found = {f"parameters.{name}": values.get(id(parameter)) for name, parameter in trained(strategy.module)}

    def fill(state: dict[str, Tensor]) -> None:
        for name in now:
            state[name].copy_(now[name])
            if (value := found[name]) is not None:
                _give(state[name], value)

    now = {name: value.clone() for name, value in strategy.state().items() if name in found}
    strategy.load(now, fill)


@torch.no_grad()
def _give(kept: Tensor, value: Tensor) -> None:
    """Copy rank 0's value to the parameter of every worker."""
    value = value.to(kept.dtype).contiguous()
    if isinstance(kept, DTensor):
        shard = distribute_tensor(value, kept.device_mesh, kept.placements).to_local()
        kept.to_local().copy_(shard)
        return
    if dist.is_initialized():
        dist.broadcast(value, src=0)
    kept.copy_(value)

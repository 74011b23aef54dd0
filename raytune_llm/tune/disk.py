"""The check that the disk has room for the checkpoints of waiting trials, which are large in full fine-tuning."""

from __future__ import annotations

from raytune_llm.byte_size import in_units
from raytune_llm.config.sweep import Sweep
from raytune_llm.disk import free_bytes
from raytune_llm.errors import ResourceError
from raytune_llm.tune.halving import halving_of
from raytune_llm.tune.study import TRIALS


def check_disk(sweep: Sweep, checkpoint_bytes: int) -> None:
    """Raises ResourceError if the trials that wait at the same time need more than the free space. checkpoint_bytes: the least
    that one trial needs."""
    folder = sweep.folder.absolute()
    there = len(list(folder.glob(f"{TRIALS}/*/checkpoints")))
    left = max(0, waiting(sweep) - there)
    free = free_bytes(folder)
    if left * checkpoint_bytes > free:
        each = f"{left} trials that wait with a checkpoint of {in_units(checkpoint_bytes)} each"
        raise ResourceError(
            f"{folder} has no room for {each}: {in_units(free)} are free",
            "Set output_dir on a larger disk, train an adapter, lower tune.trials, or with ASHA raise tune.reduction.",
        )


def waiting(sweep: Sweep) -> int:
    """The least number of a sweep's trials that wait at the same time with a checkpoint."""
    tune = sweep.tune
    if (halving := halving_of(sweep)) is not None:
        return halving.waiting
    all_of_them = tune.trials if tune.learns and tune.trials else len(sweep.planned)
    return all_of_them if tune.rounds or tune.pause_at is not None else 0

"""Finds settings with which a run would fit on a device that is too small for it, and explains out-of-memory errors.

Each set of settings is tried on the run's config, so that nothing is suggested that its rules refuse.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations, product

import torch
from pydantic import ValidationError
from transformers import PretrainedConfig

from raytune_llm.byte_size import in_units
from raytune_llm.config.overrides import changed
from raytune_llm.config.resources import uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.memory.footprint import USABLE, Needs, estimate, least_recomputation, needs_set, parameters_of
from raytune_llm.memory.model import Memory
from raytune_llm.models.activations import CHECKPOINTING
from raytune_llm.models.quantization import QUANTIZATIONS, quantization_of

MAX_WORKERS = 8
"""Sharding is tried over up to this many workers, the GPUs of a common host."""
LENGTH_STEP = 128
"""Only multiples of this many tokens are tried as data.max_length."""
NAMED = 3
"""Maximum number of fixes that an error names."""

Settings = tuple[str, ...]
"""Overrides as on the command line, which are applied together."""


@dataclass(frozen=True, kw_only=True)
class Fix:
    """Settings with which a run fits, and the memory that a worker then needs."""

    settings: Settings
    memory: Memory


class SuggestedFixes:
    """Finds settings with which a run that needs too much memory would fit."""

    def __init__(
        self,
        run: TrainRun,
        config: PretrainedConfig,
        needs: Needs,
        usable_bytes: float,
        *,
        auto_bytes: float | None = None,
        on_gpu: bool = True,
    ) -> None:
        """usable_bytes: the maximum for a worker's peak. auto_bytes: the limit that train.activation_checkpointing=auto uses, if
        that is another one. on_gpu: each worker has memory of its own, and host memory can be offloaded to."""
        self.run = changed(run, [f"resources.num_workers={needs.world_size}"])
        self.config, self.needs, self.usable_bytes, self.on_gpu = config, needs, usable_bytes, on_gpu
        self.auto_bytes = usable_bytes if auto_bytes is None else auto_bytes
        self._counted = {run.adapter.option: needs.parameters}

    def sets(self) -> tuple[Fix, ...]:
        """Minimal sets of settings with which the run fits, the smallest first."""
        axes = self._axes()
        found: dict[frozenset[str], Fix] = {}
        for chosen in _subsets(axes):
            if any(smaller < set(chosen) for smaller in found):
                continue
            tried = (self._fix(settings) for settings in _together(axes, chosen))
            fix = next((fix for fix in tried if fix is not None), None)
            if fix is not None:
                found[frozenset(chosen)] = fix
        return tuple(found.values())

    def shorter(self, *, alone: bool = False) -> Fix | None:
        """The longest data.max_length that fits, with as few other changes as possible. alone: with no other change. None if no
        length fits."""
        axes = self._axes()
        for size in range(1 if alone else len(axes) + 1):
            ways = chain.from_iterable(_together(axes, chosen) for chosen in combinations(axes, size))
            longest = [(length, settings) for settings in ways if (length := self._longest(settings))]
            if longest:
                return self._of_length(*max(longest, key=lambda found: found[0]))
        return None

    def least(self) -> tuple[Fix, ...]:
        """The minimal sets, or if there are none, the fix with a shorter data.max_length."""
        shorter = None if (found := self.sets()) else self.shorter()
        return found if shorter is None else (shorter,)

    def _longest(self, settings: Settings) -> int | None:
        lengths = range(LENGTH_STEP, self.run.data.max_length, LENGTH_STEP)
        fitting = bisect_left(lengths, True, key=lambda length: self._of_length(length, settings) is None)
        return lengths[fitting - 1] if fitting else None

    def _of_length(self, length: int, settings: Settings) -> Fix | None:
        return self._fix((f"data.max_length={length}", *settings))

    def _fix(self, settings: Settings) -> Fix | None:
        """The fix with these settings; None if the config or the model refuses them, or if the run would still not fit."""
        try:
            run = changed(self.run, settings)
            needs = self._needs_of(run)
        except (ConfigError, ValidationError):
            return None
        memory = estimate(run, self.config, needs)
        return Fix(settings=settings, memory=memory) if memory.total <= self.usable_bytes else None

    def _needs_of(self, run: TrainRun) -> Needs:
        if run.adapter.option not in self._counted:
            self._counted[run.adapter.option] = parameters_of(run, self.config)
        assert isinstance(run.resources.num_workers, int)
        needs = replace(
            self.needs,
            parameters=self._counted[run.adapter.option],
            world_size=run.resources.num_workers,
            **needs_set(run),
        )
        if run.train.activation_checkpointing == "auto" and self.on_gpu:
            return least_recomputation(needs, partial(estimate, run, self.config), self.auto_bytes)
        return needs

    def _axes(self) -> dict[str, list[Settings]]:
        """Axis -> alternative settings that lower the need for memory, the cheapest first."""
        needs = self.needs
        axes: dict[str, list[Settings]] = {
            "checkpointing": [(f"train.activation_checkpointing={name}",) for name in self._checkpointing()],
            "micro-batch": [("train.micro_batch_size=1",)] if needs.micro_batch_size > 1 else [],
            "sharding": list(self._sharded()),
            "adapter": [("adapter=lora",), *self._unquantized(("adapter=lora",))] if needs.parameters.frozen == 0 else [],
            "quantization": list(self._quantized()),
            "reference": [("stage.reference=precomputed",)] if needs.reference == "online" else [],
        }
        return {axis: ways for axis, ways in axes.items() if ways}

    def _checkpointing(self) -> Iterator[str]:
        """Options of activation checkpointing that keep less on the device. If the current one was chosen by auto, it is
        included, since with other changes auto might choose one that doesn't fit."""
        names = list(CHECKPOINTING)
        chosen_by_memory = self.run.train.activation_checkpointing == "auto"
        for name in names[names.index(self.needs.checkpointing) + (not chosen_by_memory) :]:
            way = CHECKPOINTING[name]
            if way.budget < 1 and way.possible(compiled=self.needs.compiled) and (self.on_gpu or not way.leaves):
                yield name

    def _sharded(self) -> Iterator[Settings]:
        """Settings that shard the run, over the fewest workers first."""
        run, world = self.run, self.needs.world_size
        strategy = () if run.strategy.shards else ("strategy=fsdp",)
        local = ("resources=local",) if not uses_ray(run.resources) else ()
        more = range(world + 1, MAX_WORKERS + 1) if self.on_gpu else ()
        spread = [(*local, f"resources.num_workers={number}") for number in more if run.train.global_batch_size % number == 0]
        ways = [way for workers in ([()] if world > 1 else []) + spread if (way := (*strategy, *workers))]
        yield from ways
        yield from self._unquantized(*ways)

    def _unquantized(self, *ways: Settings) -> list[Settings]:
        """The settings, with quantization=none added if they may be refused with quantized weights."""
        return [(*way, "quantization=none") for way in ways] if self.needs.quantization.replaces_layers else []

    def _quantized(self) -> Iterator[Settings]:
        """Settings that quantize to fewer bits than now and that the device supports."""
        case = self.needs.case
        device = (case.device_type, case.capability) if self.on_gpu else ("cpu", (0, 0))
        now = quantization_of(self.needs.quantization)
        bits = 8 * case.dtype.itemsize if now is None else now.bits_per_weight
        for name, kind in QUANTIZATIONS.items():
            if kind is not None and kind.bits_per_weight < bits and kind.lacks(*device) is None:
                yield (f"quantization={name}",)


def ran_out(
    run: TrainRun, config: PretrainedConfig, needs: Needs, *, during: str, taken: int, total: int, others: int = 0
) -> ResourceError:
    """The error for a GPU whose memory ran out: in which phase, the estimate, the bytes that were allocated, and what would fit.

    during: the phase. taken: bytes allocated by this process. total: bytes of the GPU. others: bytes that other processes hold.
    """
    expected = estimate(run, config, needs).total
    # The run needed more than the estimate, so a fix must be estimated to need less than this run's estimate.
    usable = USABLE * min(total - others, expected)
    suggested = SuggestedFixes(run, config, needs, usable, auto_bytes=USABLE * total)
    fixes = suggested.sets()[:NAMED]
    shorter = suggested.shorter(alone=bool(fixes)) if len(fixes) < NAMED else None
    ways = [f"{' '.join(fix.settings)} (about {in_units(fix.memory.total)})" for fix in (*fixes, shorter) if fix]
    ways = ways or ["a smaller model, or a GPU with more memory"]
    held = f"; other processes hold {in_units(others)} of it" if others else ""
    return ResourceError(
        f"out of GPU memory during {during}: the estimate was {in_units(expected)}, {in_units(taken)} "
        f"of {in_units(total)} were allocated{held}",
        f"{'End those (nvidia-smi lists them), or set' if others else 'Set'} {', or '.join(ways)}.",
    )


def held_by_others(device: torch.device) -> int:
    """Bytes of a GPU that other processes hold; 0 if it is no more than this process's CUDA context and libraries may take."""
    free, total = torch.cuda.mem_get_info(device)
    held = total - free - torch.cuda.memory_reserved(device)
    return held if held > (1 - USABLE) * total else 0


def _subsets(axes: Mapping[str, Sequence[Settings]]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(axes, size) for size in range(1, len(axes) + 1))


def _together(axes: Mapping[str, Sequence[Settings]], chosen: Sequence[str]) -> Iterator[Settings]:
    """Every combination of one alternative from each of these axes."""
    return (tuple(chain.from_iterable(ways)) for ways in product(*(axes[axis] for axis in chosen)))

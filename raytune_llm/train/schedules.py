"""Learning-rate schedules as functions of the step, so that a resumed run needs no state for them.

Each takes the number of the next step (from 0), the number of warm-up steps and of all steps, and returns the learning rate as a
fraction of the peak. Names and formulas follow transformers' schedules of the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from raytune_llm.config.schedule import ScheduleConfig
from raytune_llm.config.section import settings_of


def constant(step: int, warmup: int, total: int) -> float:
    return _warming(step, warmup)


def linear(step: int, warmup: int, total: int) -> float:
    return _warming(step, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, warmup: int, total: int, *, floor: float) -> float:
    """Half a cosine period down to `floor` (Loshchilov & Hutter 2016)."""
    if step < warmup:
        return _warming(step, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step: int, warmup: int, total: int, *, decay_ratio: float | None, floor: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024). The decay is half a cosine period over the last decay_ratio of all steps."""
    decay = total - warmup - (total - warmup) // 3 if decay_ratio is None else math.ceil(decay_ratio * total)
    stable_end = max(warmup, total - decay)
    if step < stable_end:
        return _warming(step, warmup)
    progress = min(1.0, (step - stable_end) / max(1, total - stable_end))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def inverse_sqrt(step: int, warmup: int, total: int, *, timescale: int | None) -> float:
    """1 / sqrt(1 + t / timescale), where t is the number of steps since the warm-up (Zhai et al. 2021)."""
    if step < warmup:
        return _warming(step, warmup)
    scale = timescale or warmup or 10_000
    return 1 / math.sqrt((step + scale - warmup) / scale)


def polynomial(step: int, warmup: int, total: int, *, power: float, end: float) -> float:
    if step < warmup:
        return _warming(step, warmup)
    if step >= total:
        return end
    return end + (1 - end) * (1 - (step - warmup) / (total - warmup)) ** power


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
    "polynomial": polynomial,
}


def learning_rate(schedule: ScheduleConfig, *, peak: float, total: int) -> Callable[[int], float]:
    """The learning rate by step, for a run of `total` steps."""
    settings = settings_of(schedule)
    shape = SCHEDULES[schedule.name]
    ratio, steps = settings.pop("warmup_ratio"), settings.pop("warmup_steps")
    warmup = math.ceil(ratio * total) if steps is None else steps
    if "lr_end" in settings:
        settings["end"] = settings.pop("lr_end") / peak
    return lambda step: peak * shape(step, warmup, total, **settings)


def _warming(step: int, warmup: int) -> float:
    return 1.0 if step >= warmup else step / warmup

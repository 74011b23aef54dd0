"""Sums between two log steps, kept on the device and reduced over workers when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from raytune_llm.records import LossOut


class Window:
    """Sums and counts by name. Only `read` synchronizes with the device."""

    def __init__(self, device: torch.device, restored: Mapping[str, tuple[float, float]]) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        if not dist.is_initialized() or dist.get_rank() == 0:
            for name, (total, count) in restored.items():
                self.add(name, total, count)

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        pair = torch.stack([_scalar(total, self.device), _scalar(count, self.device)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_loss(self, out: LossOut) -> None:
        """Add a loss, as `loss`, and its metrics."""
        self.add("loss", out.total, out.count)
        for name, (total, count) in out.metrics.items():
            self.add(name, total, count)

    def read(self) -> dict[str, tuple[float, float]]:
        """(sum, count) of each name over all workers. Collective: every worker calls it, with the same names or none."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {name: (total, count) for name, (total, count) in zip(names, sums.tolist(), strict=True)}

    def clear(self) -> None:
        self._sums.clear()


def added(sources: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """The sums and counts of several readings, added up by name."""
    whole: dict[str, tuple[float, float]] = {}
    for sums in sources:
        for name, (total, count) in sums.items():
            before = whole.get(name, (0.0, 0.0))
            whole[name] = before[0] + total, before[1] + count
    return whole


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    # float64 on the device: sums over a window lose no precision, and a resumed window is identical
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)

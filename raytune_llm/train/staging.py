"""A copy of a training state in the host's memory, which is written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Copies of a state in the host's memory, which training leaves alone while they are written.

    The memory is kept for the next copy. Of a GPU's tensors it is pinned, which the GPU writes to several times as fast, and all
    are copied before the host waits for one.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Valid until the next call."""
        copies = {name: self._copy(name, value) for name, value in state.items()}
        self._kept = {name: self._kept[name] for name in state}
        if any(value.is_cuda for value in state.values()):
            torch.cuda.synchronize()
        return copies

    def _copy(self, name: str, value: Tensor) -> Tensor:
        local = (value.to_local() if isinstance(value, DTensor) else value).detach()
        kept = self._kept.get(name)
        if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
            kept = self._kept[name] = torch.empty_like(
                local, device="cpu", memory_format=torch.contiguous_format, pin_memory=local.is_cuda
            )
        kept.copy_(local, non_blocking=True)
        if not isinstance(value, DTensor):
            return kept
        # The writer reads only ranks from the mesh; the shard itself knows its device.
        return DTensor.from_local(
            kept, value.device_mesh, value.placements, shape=value.shape, stride=value.stride(), run_check=False
        )

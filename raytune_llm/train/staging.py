"""A copy of the training state in host memory, which is written to disk while training continues."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Copies a state to host memory, so that training can change the original while the copy is written.

    The memory is reused for the next copy. For tensors of a GPU it is pinned, which makes the copy several times faster, and the
    host waits only once for all of them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the state. It is valid until the next call."""
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
        # The writer uses only the ranks of the mesh, so the mesh may stay the GPU's.
        return DTensor.from_local(
            kept, value.device_mesh, value.placements, shape=value.shape, stride=value.stride(), run_check=False
        )

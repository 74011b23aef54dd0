"""A copy of the training state in host memory, which is written to disk while training continues."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Copies a state to host memory, so that training can change the original while the copy is written.

    The memory is reused for the next copy. For tensors of a GPU it is pinned, which makes the copy several times faster. The host
    doesn't wait for it: what training computes next comes after the copies in the GPU's queue.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the state. It is valid after `wait` and until the next call."""
        copies = {name: self._copy(name, value) for name, value in state.items()}
        self._kept = {name: self._kept[name] for name in state}
        if any(value.is_cuda for value in state.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Wait until the GPU has made the last copy. May be called in another thread."""
        if self._copied is not None:
            self._copied.synchronize()

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

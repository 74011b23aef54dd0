"""A copy of the training state in host memory, which is written to disk while training continues."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Copies a state to host memory, so that training can change the original while the copy is written.

    The memory is reused for the next copy. For tensors of a GPU it is pinned, which makes the copy several times faster. They are
    copied in a stream of their own, beside the forward and backward pass of the next step. Whatever changes them, or needs the
    memory of temporary ones, calls `hold` first.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._sources: Sequence[Tensor] = ()
        """Some are temporary, and must live until they are copied."""
        self._made_in: torch.cuda.Stream | None = None
        self._enough = threading.Event()

    def reserve(self, like: Mapping[str, Tensor]) -> None:
        """Take pinned memory for copies of such tensors, which may be on the meta device. To be called in another thread while
        training goes on: kernels can't start while CUDA pins memory, so each pause is half as long as the pinning before it."""
        for name, value in like.items():
            began = time.perf_counter()
            self._memory(name, value, pinned=True)
            if self._enough.wait((time.perf_counter() - began) / 2):
                return

    def stop_reserving(self) -> None:
        """Let `reserve` end; `copy` takes the memory that is still missing."""
        self._enough.set()

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the state. It is valid after `wait` and until the next call."""
        sources = {name: local_of(value) for name, value in state.items()}
        kept = {name: self._memory(name, value, pinned=value.is_cuda) for name, value in sources.items()}
        self._kept = kept
        if any(value.is_cuda for value in sources.values()):
            self._stream, self._made_in = self._stream or torch.cuda.Stream(), torch.cuda.current_stream()
            self._stream.wait_stream(self._made_in)
            with torch.cuda.stream(self._stream):
                _copy(sources, kept)
            self._copied, self._sources = torch.cuda.Event(), list(sources.values())
            self._copied.record(self._stream)
        else:
            _copy(sources, kept)
        return {name: _placed_as(value, kept[name]) for name, value in state.items()}

    def hold(self) -> None:
        """Let the current stream wait until the last copy is made."""
        if self._copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._copied)
            if stream == self._made_in:
                self._sources = ()  # what uses their memory next comes later in this stream

    def wait(self) -> None:
        """Wait until the last copy is made. May be called in another thread."""
        if self._copied is not None:
            self._copied.synchronize()
            self._sources = ()

    def _memory(self, name: str, like: Tensor, *, pinned: bool) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.shape != like.shape or kept.dtype != like.dtype:
            kept = self._kept[name] = torch.empty_like(
                like, device="cpu", memory_format=torch.contiguous_format, pin_memory=pinned
            )
        return kept


def local_of(value: Tensor) -> Tensor:
    """What this worker holds of it."""
    return (value.to_local() if isinstance(value, DTensor) else value).detach()


def _copy(sources: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    for name, value in sources.items():
        kept[name].copy_(value, non_blocking=True)


def _placed_as(value: Tensor, kept: Tensor) -> Tensor:
    """The copy as a part of what `value` is a part of."""
    if not isinstance(value, DTensor):
        return kept
    # The writer uses only the ranks of the mesh, so the mesh may stay the GPU's.
    return DTensor.from_local(
        kept, value.device_mesh, value.placements, shape=value.shape, stride=value.stride(), run_check=False
    )

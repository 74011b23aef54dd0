"""Activation checkpointing and offloading of the layers, and their compilation.

In compiled layers, the compiler's partitioner chooses what to keep. It knows what the backward pass needs, so it recomputes less
than a whole layer (for example, not its last product). Layers that are not compiled are recomputed as a whole.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as partitioner
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy
from transformers import PreTrainedModel

from raytune_llm.errors import ConfigError

CAPABILITY = (7, 0)
"""The lowest CUDA compute capability that Triton supports."""


@dataclass(frozen=True)
class Checkpointing:
    """The activations that a layer saves for the backward pass."""

    budget: float
    """The fraction of a layer's activations that is kept. 0.0 keeps only the input (and attention's output in compiled
    layers)."""
    leaves: bool = False
    """Kept activations are offloaded to host memory."""
    compiled: bool = False
    """It needs compiled layers; others are recomputed as a whole or not at all."""

    @property
    def on_device(self) -> float:
        """The fraction of a layer's activations that stays on the device."""
        return 0.0 if self.leaves else self.budget

    def possible(self, *, compiled: bool) -> bool:
        return compiled or not self.compiled


CHECKPOINTING = {
    "none": Checkpointing(1.0),
    "selective": Checkpointing(0.5, compiled=True),
    "full": Checkpointing(0.0),
    "offload": Checkpointing(0.01, leaves=True),
}
"""train.activation_checkpointing -> what is kept, from most memory and least time to least memory and most time."""
ATTENTION = {"_scaled_dot_product_cudnn_attention", "_varlen_attn", "document_attention"}
"""Names of attention operators that the partitioner does not recognize by itself."""


class KeepAttention(CustomGraphPass):
    """Makes the partitioner keep attention's output and log-sum-exp unless its budget is 0.0, since recomputing them is the most
    expensive for their size. By itself, it does so only for some of torch's operators."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket.__name__ in ATTENTION:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def compiles(asked: bool | str, device_type: str, *, never: str | None = None, lacking: str | None = None) -> tuple[bool, str]:
    """Whether layers are compiled, and the reason. never: a reason why the run can't be compiled on any device. lacking: what the
    compiler needs on this device and does not find."""
    if asked == "auto":
        if device_type != "cuda":
            return False, "a CPU gains less than compiling costs"
        against = never or lacking
        return against is None, against or "a GPU"
    if asked and lacking is not None:
        raise ConfigError("train.compile", f"can't be true here: {lacking}", got=True, fix="Set train.compile=auto.")
    return bool(asked), "asked for"


def lacks_for_compiling(device: torch.device) -> str | None:
    """The reason why kernels can't be compiled on this GPU; None if they can."""
    if device.type != "cuda":
        return None
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "Triton needs a C compiler, and finds neither gcc nor clang"
    headers = Path(sysconfig.get_path("include", "posix_prefix"))  # where Triton searches, also with Debian's own Python
    if not (headers / "Python.h").exists():
        return f"Triton needs Python's headers, which {headers} lacks (the package python3-dev)"
    found = torch.cuda.get_device_capability(device)
    return (
        None if found >= CAPABILITY else "Triton needs compute capability {}.{}, this GPU has {}.{}".format(*CAPABILITY, *found)
    )


def keep(model: PreTrainedModel, layers: Sequence[nn.Module], checkpointing: str, *, compile_layers: bool) -> None:
    """Set up what the layers keep, and whether they are compiled. Compilation happens when they first run."""
    chosen = CHECKPOINTING[checkpointing]
    if not chosen.possible(compiled=compile_layers):
        raise ConfigError(
            "train.activation_checkpointing",
            "can be selective only if layers are compiled",
            got=checkpointing,
            fix="Set full.",
        )
    if compile_layers:
        if partitioner.activation_memory_budget != chosen.budget:
            torch._dynamo.reset()  # compiled code would not read the new budget
        partitioner.activation_memory_budget = chosen.budget
        inductor.joint_custom_pre_pass = KeepAttention()
        for layer in layers:
            layer.compile()
    elif chosen.budget < 1:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:  # a model's own code may not support it
            rule = f"must be none for {type(model).__name__} ({error})"
            raise ConfigError("train.activation_checkpointing", rule, got=checkpointing, fix="Set none.") from error


@dataclass(eq=False, slots=True)
class _Moved:
    number: int
    host: Tensor
    device: torch.device
    back: Tensor | None = None
    arrived: torch.Event | None = None


class HostMemory:
    """Offloads what autograd saves to page-locked host memory. Copies overlap with the computation: in the backward pass, tensors
    for the next layer are copied back while a layer computes. An instance serves one forward and backward pass.
    """

    AHEAD = 2
    """Number of tensors to prefetch."""

    def __init__(self, *, min_bytes: int) -> None:
        self.min_bytes = min_bytes
        self.stream = torch.cuda.Stream()
        self.moved: list[_Moved] = []

    def __call__(self) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Moved:
        if isinstance(tensor, nn.Parameter) or not tensor.is_cuda or tensor.numel() * tensor.element_size() < self.min_bytes:
            return tensor
        host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.stream)
        self.moved.append(_Moved(len(self.moved), host, tensor.device))
        return self.moved[-1]

    def _unpack(self, saved: Tensor | _Moved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        for entry in reversed(self.moved[max(saved.number - self.AHEAD, 0) : saved.number + 1]):
            self._fetch(entry)
        back, saved.back = saved.back, None
        assert back is not None and saved.arrived is not None
        torch.cuda.current_stream().wait_event(saved.arrived)
        return back

    def _fetch(self, entry: _Moved) -> None:
        if entry.arrived is not None:
            return
        entry.back = torch.empty_strided(entry.host.shape, entry.host.stride(), dtype=entry.host.dtype, device=entry.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            entry.back.copy_(entry.host, non_blocking=True)
            entry.arrived = self.stream.record_event()
        entry.back.record_stream(self.stream)

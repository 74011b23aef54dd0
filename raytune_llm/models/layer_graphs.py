"""Captures the layers' forward and backward pass in training as CUDA graphs: a replay launches all kernels of a pass at once.

With few tokens per step, a GPU finishes a kernel before the host has launched the next one, and the host determines the time of a
step. Embeddings, head, loss and the optimizer step are not captured: they are a few large kernels, whose shapes change with the
number of trained tokens.

A pair of graphs serves batches of one shape with up to a number of documents; empty documents are added to reach it. A replay
writes to the same memory as the last one. So a second forward pass before the first one's backward pass runs without graphs, and
a micro-batch's gradients are copied before the next one.

A CPU has no graphs; there, passes run eagerly on the same tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from raytune_llm.errors import ConfigError
from raytune_llm.records import Batch

Beside = Mapping[str, Any] | None
"""The layers' arguments about several adapters (the route). A graph holds its tensors, so it must be one object for all
batches."""
Layers = Callable[[Tensor, Batch, Beside], Tensor]
"""(embedded [B, T, D], batch, beside) -> last hidden states [B, T, D]."""
MIN_DOCUMENTS = 8
MAX_SHAPES = 16
"""Maximum number of captured shapes, since each has gradients of its own in memory. Other shapes run without graphs."""
WARM_UP = 2
"""Passes before a capture, in which layers are compiled and libraries allocate memory."""


class LayerGraphs:
    def __init__(self, layers: Layers, trained: Callable[[], Sequence[nn.Parameter]]) -> None:
        """trained: gives the trained parameters; it is called for each new shape."""
        self._layers, self._trained = layers, trained
        self._passes: dict[tuple[Any, ...], _Pass] = {}
        self._pool: Any = None
        self._parameters: list[nn.Parameter] = []
        self._places: list[int] = []
        """Addresses of the parameters that the graphs use."""
        self._lent: list[tuple[nn.Parameter, Tensor]] = []
        """Gradients in memory that the next replay will overwrite."""
        self._begun: Callable[[], object | None] = lambda: None
        """A weak reference to the token of a pass whose backward pass is still to come. The token dies with autograd's graph."""

    def __call__(self, embedded_BTD: Tensor, batch: Batch, beside: Beside = None) -> Tensor:
        """Last hidden states [B, T, D]. The next pass may overwrite them after their backward pass. Raises ConfigError if the
        layers can't be captured."""
        self._keep_gradients()
        roomy = with_spare_documents(batch)
        pass_ = None if self._begun() is not None else self._pass_for(embedded_BTD, roomy, beside)
        if pass_ is None:
            return self._layers(embedded_BTD, batch, beside)
        anchor = torch.zeros((), device=embedded_BTD.device, requires_grad=True)  # since the embeddings may need no gradient
        return _Replay.apply(embedded_BTD, anchor, self, pass_, roomy)

    def begin(self) -> object:
        """A token that a new pass holds until its backward pass."""
        token = _Token()
        self._begun = weakref.ref(token)
        return token

    def lend(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Add these to the parameters' gradients. A parameter without a gradient uses the tensor itself, until the next pass."""
        self._begun = lambda: None
        there = [(one, found) for one, found in zip(parameters, gradients, strict=True) if found is not None]
        further = [(one.grad, found) for one, found in there if one.grad is not None]
        if further:
            torch._foreach_add_([grad for grad, _ in further], [found for _, found in further])
        self._lent = [(one, found) for one, found in there if one.grad is None]
        for one, found in self._lent:
            one.grad = found

    def _keep_gradients(self) -> None:
        kept = [(one, lent) for one, lent in self._lent if one.grad is lent]
        self._lent = []
        if kept:
            for (one, _), copied in zip(kept, torch._foreach_mul([lent for _, lent in kept], 1.0), strict=True):
                one.grad = copied

    def _pass_for(self, embedded_BTD: Tensor, batch: Batch, beside: Beside) -> _Pass | None:
        if [one.data_ptr() for one in self._parameters] != self._places:
            self._hold([])
        of_input = embedded_BTD.shape, embedded_BTD.dtype, embedded_BTD.requires_grad
        key = *of_input, len(batch.cu_seqlens_S), batch.max_seqlen, id(beside)  # a pass keeps `beside`, so its id stays unique
        if key not in self._passes and len(self._passes) < MAX_SHAPES:
            self._hold(self._trained())
            made = self._passes[key] = _Pass(self._layers, embedded_BTD, batch, self._parameters, beside)
            if embedded_BTD.is_cuda:
                self._pool = made.capture(self._pool)
        return self._passes.get(key)

    def _hold(self, parameters: Sequence[nn.Parameter]) -> None:
        """Drop all graphs if the parameters, or their addresses, have changed."""
        places = [one.data_ptr() for one in parameters]
        if places != self._places:
            self._passes, self._pool = {}, None
            self._parameters, self._places = list(parameters), places


class _Token:
    pass


class _Pass:
    """The forward and backward pass for batches of one shape, with inputs and outputs at fixed addresses."""

    def __init__(
        self, layers: Layers, embedded_BTD: Tensor, batch: Batch, parameters: Sequence[nn.Parameter], beside: Beside
    ) -> None:
        self._layers, self.parameters, self._beside = layers, parameters, beside
        self._embedded_BTD = embedded_BTD.detach().clone().requires_grad_(embedded_BTD.requires_grad)
        self._batch = replace(
            batch,
            ids_BT=torch.zeros_like(batch.ids_BT),
            positions_BT=batch.positions_BT.clone(),
            cu_seqlens_S=batch.cu_seqlens_S.clone(),
        )
        self._out_BTD: Tensor
        self._towards_out_BTD = torch.zeros_like(embedded_BTD)
        self._towards_embedded_BTD: Tensor | None = None
        self._gradients: list[Tensor | None] = []
        self._forward: Callable[[], None] = self._compute
        self._backward: Callable[[], None] = self._differentiate

    def forward(self, embedded_BTD: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            self._embedded_BTD.copy_(embedded_BTD)
        self._batch.positions_BT.copy_(batch.positions_BT)
        self._batch.cu_seqlens_S.copy_(batch.cu_seqlens_S)
        self._forward()
        return self._out_BTD.detach()

    def backward(self, towards_out_BTD: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the embeddings and of the parameters; None for those without a part in the result."""
        self._towards_out_BTD.copy_(towards_out_BTD)
        self._backward()
        return self._towards_embedded_BTD, self._gradients

    def capture(self, pool: Any) -> Any:
        """Capture the graphs. pool: the memory pool of other passes, which can be shared since only one pass runs at a time;
        None: a new one. Returns the pool."""
        device = self._embedded_BTD.device
        aside, now = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        # The generator is restored: a step's random numbers must not depend on whether it was the first of its shape.
        with torch.random.fork_rng([device]), _casts_kept_in_graphs(device):
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._compute()
                    self._differentiate()
            now.wait_stream(aside)
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            graph = torch.cuda.graph  # other threads (loaders, savers) may use the device during a capture
            try:
                with graph(forward, pool=pool, stream=aside, capture_error_mode="thread_local"):
                    self._compute()
                with graph(backward, pool=forward.pool(), stream=aside, capture_error_mode="thread_local"):
                    self._differentiate()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                rule = f"can't be true for this model, whose layers can't be captured ({why})"
                raise ConfigError("train.cuda_graphs", rule, got=True, fix="Set train.cuda_graphs=false.") from error
        self._forward, self._backward = forward.replay, backward.replay
        return forward.pool()

    def _compute(self) -> None:
        with torch.enable_grad():
            self._out_BTD = self._layers(self._embedded_BTD, self._batch, self._beside)

    def _differentiate(self) -> None:
        inputs = [self._embedded_BTD, *self.parameters] if self._embedded_BTD.requires_grad else list(self.parameters)
        found: list[Tensor | None] = list(
            torch.autograd.grad(self._out_BTD, inputs, self._towards_out_BTD.to(self._out_BTD.dtype), allow_unused=True)
        )
        self._out_BTD = self._out_BTD.detach()
        self._towards_embedded_BTD = found.pop(0) if self._embedded_BTD.requires_grad else None
        places: set[int] = set()
        self._gradients = []
        for parameter, gradient in zip(self.parameters, found, strict=True):
            self._gradients.append(None if gradient is None else _as_own(parameter, gradient, places))


def _as_own(parameter: nn.Parameter, gradient: Tensor, places: set[int]) -> Tensor:
    """The gradient in the parameter's layout and in memory of its own, as autograd would leave it in `grad`. places: addresses of
    other gradients."""
    if gradient.stride() != parameter.stride() or gradient.data_ptr() in places:
        gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
    places.add(gradient.data_ptr())
    return gradient


def _casts_kept_in_graphs(device: torch.device) -> torch.autocast:
    """The current autocast without its cache: a replay would not repeat a cast that was cached before the capture."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedded_BTD: Tensor, anchor: Tensor, graphs: LayerGraphs, pass_: _Pass, batch: Batch) -> Tensor:
        ctx.graphs, ctx.pass_, ctx.begun = graphs, pass_, graphs.begin()
        return pass_.forward(embedded_BTD, batch)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, towards_out_BTD: Tensor) -> Any:  # type: ignore[override]
        towards_embedded_BTD, gradients = ctx.pass_.backward(towards_out_BTD)
        ctx.graphs.lend(ctx.pass_.parameters, gradients)
        return towards_embedded_BTD, None, None, None, None


def with_spare_documents(batch: Batch) -> Batch:
    """The batch with empty documents added, so that their number is 8 or a larger power of two, and with max_seqlen rounded up,
    so that few shapes occur."""
    bounds_S = batch.cu_seqlens_S
    documents = max(1 << (len(bounds_S) - 2).bit_length(), MIN_DOCUMENTS)
    spare = bounds_S[-1:].expand(documents + 1 - len(bounds_S))
    longest = max(1 << (batch.max_seqlen - 1).bit_length(), 1024)
    return replace(batch, cu_seqlens_S=torch.cat([bounds_S, spare]), max_seqlen=longest)

"""Functions of the logits of the trained tokens, chunk by chunk, without computing any logits twice.

A token function's value depends on its own row of logits alone. So its gradient with respect to the hidden states can be taken
in the forward pass, while the chunk's logits exist, for an upstream gradient of one, and scaled by the real one in the backward
pass. What stays between the passes is [N, D] and not [N, V]; only where the head is trained are the logits' gradients kept, in
the compute type, for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

RANGE = "head and loss"
"""The name of what happens here in traces."""
CHUNK_TOKENS, TRAINED_CHUNKS = 1024, 8
"""Tokens whose logits exist at once, by default, and how many times as many where the head is trained: it keeps the same however
they are cut, and each cut is a pass over its gradient."""
TokenFunction = Callable[..., Tensor | tuple[Tensor, ...]]
"""(logits_NV, targets_N) -> one value a token [N], or several, [N, K] or a tuple of [N]; what it says of a token depends on that
token's logits alone. A value of a tuple that has no gradient (a metric) costs none."""


def token_values(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    token_function: TokenFunction,
    *,
    compute: torch.dtype,
    chunk_tokens: int,
    compiled: bool = False,
    other_ND: Tensor | None = None,
) -> Tensor:
    """token_function(hidden @ weight.T, targets), with products in `compute`: [N], or [N, K] if it returns several values.
    Differentiable in hidden and weight, once. Where there are other hidden states, it takes their logits as well, which are
    constants."""
    run = _compiled(token_function) if compiled else token_function
    if not (torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)):
        weight = weight_VD.detach().to(compute).T
        return torch.cat(
            [
                together(run(hidden.to(compute) @ weight, targets, *(other.to(compute) @ weight for other in others)))
                for hidden, targets, *others in chunks(chunk_tokens, hidden_ND, targets_N, other_ND)
            ]
        )
    return _TokenValues.apply(hidden_ND, weight_VD, targets_N, other_ND, run, compute, chunk_tokens)


def chunks(size: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """So many rows at a time of those that there are; once where they have no rows at all."""
    return zip(*(tensor.split(size) for tensor in tensors if tensor is not None), strict=True)


def together(values: Tensor | tuple[Tensor, ...]) -> Tensor:
    """[N], or [N, K] of several."""
    return torch.stack(values, dim=1) if isinstance(values, tuple) else values


def adjusted(token_function: TokenFunction, scale: float | None, softcap: float | None) -> TokenFunction:
    """The function of logits times scale, then capped: softcap tanh(logits / softcap)."""
    return token_function if scale is None and softcap is None else _adjusted(token_function, scale, softcap)


class _TokenValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        other_ND: Tensor | None,
        run: TokenFunction,
        compute: torch.dtype,
        chunk: int,
    ) -> Tensor:
        weight = weight_VD.detach().to(compute)
        keep = ctx.needs_input_grad[1]
        values, towards_hidden, towards_logits = [], [], []
        with torch.autocast(hidden_ND.device.type, enabled=False), record_function(RANGE):
            for hidden, targets, *others in chunks(chunk, hidden_ND.detach(), targets_N, other_ND):
                hidden = hidden.to(compute)
                value, ctx.sloped, slopes = _of_chunk(hidden, weight, targets, others, run)
                values.append(value)
                towards_hidden.append(torch.stack([slope @ weight for slope in slopes]))
                towards_logits += [(hidden, slopes)] if keep else []
                del slopes  # or they would be there beside the next chunk's
        ctx.save_for_backward(torch.cat(towards_hidden, dim=1))
        ctx.towards_logits, ctx.chunk = towards_logits, chunk
        ctx.types = hidden_ND.dtype, weight_VD.dtype
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        with record_function(RANGE):
            return _TokenValues._towards_inputs(ctx, grad)

    @staticmethod
    def _towards_inputs(ctx: Any, grad: Tensor) -> Any:
        (slopes_KND,) = ctx.saved_tensors
        grad_KN1 = (grad.T[ctx.sloped] if grad.ndim > 1 else grad[None])[..., None].to(slopes_KND.dtype)
        grad_ND = (slopes_KND * grad_KN1).sum(0).to(ctx.types[0])
        grad_VD = None
        for (hidden, slopes), scale_KN1 in zip(
            ctx.towards_logits, grad_KN1.split(ctx.chunk, dim=1), strict=bool(ctx.towards_logits)
        ):
            for slope, scale in zip(slopes, scale_KN1, strict=True):
                part = slope.T @ (hidden * scale)
                grad_VD = part.to(ctx.types[1]) if grad_VD is None else grad_VD.add_(part)
        ctx.towards_logits = []
        return grad_ND, grad_VD, None, None, None, None, None


def _of_chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, others: Sequence[Tensor], run: TokenFunction
) -> tuple[Tensor, list[int], list[Tensor]]:
    """The function's values of a chunk, which of them have a gradient, and their gradients by the logits."""
    logits = (hidden @ weight.T).requires_grad_()
    torch._dynamo.maybe_mark_dynamic(logits, 0)
    torch._dynamo.maybe_mark_dynamic(targets, 0)
    with torch.enable_grad():
        value = run(logits, targets, *(other.to(hidden.dtype) @ weight.T for other in others))
        columns = value if isinstance(value, tuple) else value.unbind(1) if value.ndim > 1 else (value,)
        sloped = [k for k, column in enumerate(columns) if column.requires_grad]
        sums = [columns[k].sum() for k in sloped]
    last = len(sums) - 1
    slopes = [torch.autograd.grad(one, logits, retain_graph=k < last)[0] for k, one in enumerate(sums)]
    return together(value).detach(), sloped, slopes


@lru_cache
def _adjusted(token_function: TokenFunction, scale: float | None, softcap: float | None) -> TokenFunction:
    return partial(_of_adjusted, token_function, scale, softcap)


def _of_adjusted(
    token_function: TokenFunction,
    scale: float | None,
    softcap: float | None,
    logits_NV: Tensor,
    targets_N: Tensor,
    *others_NV: Tensor,
) -> Tensor | tuple[Tensor, ...]:
    logits_NV, *others = (changed(logits, scale, softcap) for logits in (logits_NV, *others_NV))
    return token_function(logits_NV, targets_N, *others)


def changed(logits_NV: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """How a few families change the logits: scale, then softcap."""
    if scale is not None:
        logits_NV = logits_NV * scale
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


@lru_cache
def _compiled(token_function: TokenFunction) -> TokenFunction:
    return torch.compile(token_function)

"""Applies functions to the logits of the trained tokens, chunk by chunk, without computing any logits twice.

A token function's value depends only on its own row of logits. So the forward pass computes the gradient with respect to the
hidden states while the chunk's logits exist, for an upstream gradient of 1, and the backward pass multiplies it by the real
upstream gradient. Between the passes [N, D] is kept instead of [N, V]. If the head is trained, the logits' gradients are kept
too, in the compute type, for the head's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

RANGE = "head and loss"
"""The name of this computation in traces."""
CHUNK_TOKENS, TRAINED_CHUNKS = 1024, 8
"""Tokens whose logits exist at the same time, and the factor by which a trained head has more: it keeps all gradients anyway, and
each chunk costs a pass over its weight's gradient."""
TokenFunction = Callable[..., Tensor | tuple[Tensor, ...]]
"""(logits_NV, targets_N) -> one value per token [N], or several: [N, K] or a tuple of [N]. A token's values depend only on its
own logits. In a tuple, values without a gradient (metrics) cost no backward pass."""


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
    """token_function(hidden @ weight.T, targets), with products in `compute`: [N], or [N, K] if it returns several values. It can
    be differentiated once with respect to hidden and weight. other_ND: more hidden states, whose logits token_function takes as a
    third argument, without gradient."""
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
    """Split the tensors into pieces of `size` rows; None is left out. Without rows, there is one empty piece."""
    return zip(*(tensor.split(size) for tensor in tensors if tensor is not None), strict=True)


def together(values: Tensor | tuple[Tensor, ...]) -> Tensor:
    """One tensor of the values: [N], or [N, K] for a tuple."""
    return torch.stack(values, dim=1) if isinstance(values, tuple) else values


def adjusted(token_function: TokenFunction, scale: float | None, softcap: float | None) -> TokenFunction:
    """The token function applied to changed logits: times scale, then softcap tanh(logits / softcap)."""
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
                del slopes  # so that they don't exist together with those of the next chunk
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
    """The function's values for a chunk, the indices of those with a gradient, and their gradients with respect to the logits."""
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
    """The logits times scale, then capped, as a few families do."""
    if scale is not None:
        logits_NV = logits_NV * scale
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


@lru_cache
def _compiled(token_function: TokenFunction) -> TokenFunction:
    return torch.compile(token_function)

"""What the head says about the trained tokens, a chunk of them at a time, without computing any logits twice.

A token function's value depends on its own row of logits alone. So its gradient with respect to the hidden states can be taken
in the forward pass, while the chunk's logits exist, for an upstream gradient of one, and scaled by the real one in the backward
pass. What stays between the passes is [N, D] and not [N, V]; only where the head is trained are the logits' gradients kept, in
the compute type, for its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

TokenFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits_NV, targets_N) -> one value a token [N], or several [N, K]; row n of it depends on row n of the logits alone."""


def token_values(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    token_function: TokenFunction,
    *,
    compute: torch.dtype,
    chunk_tokens: int,
    compiled: bool = False,
) -> Tensor:
    """token_function(hidden @ weight.T, targets), with products in `compute`. Differentiable in hidden and weight, once."""
    run = _compiled(token_function) if compiled else token_function
    if not (torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)):
        chunks = zip(hidden_ND.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
        return torch.cat([run(h.to(compute) @ weight_VD.to(compute).T, t) for h, t in chunks])
    return _TokenValues.apply(hidden_ND, weight_VD, targets_N, run, compute, chunk_tokens)


def adjusted(token_function: TokenFunction, scale: float | None, softcap: float | None) -> TokenFunction:
    """The function of logits times scale, then capped: softcap tanh(logits / softcap)."""
    return token_function if scale is None and softcap is None else _adjusted(token_function, scale, softcap)


class _TokenValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, run: TokenFunction, compute: torch.dtype, chunk: int
    ) -> Tensor:
        weight = weight_VD.detach().to(compute)
        keep = ctx.needs_input_grad[1]
        values, towards_hidden, towards_logits = [], [], []
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for hidden, targets in zip(hidden_ND.detach().split(chunk), targets_N.split(chunk), strict=True):
                hidden = hidden.to(compute)
                logits = (hidden @ weight.T).requires_grad_()
                torch._dynamo.maybe_mark_dynamic(logits, 0)
                torch._dynamo.maybe_mark_dynamic(targets, 0)
                with torch.enable_grad():
                    value = run(logits, targets)
                    sums = value.sum(0).unbind() if value.ndim > 1 else (value.sum(),)
                last = len(sums) - 1
                slopes = [torch.autograd.grad(one, logits, retain_graph=k < last)[0] for k, one in enumerate(sums)]
                values.append(value.detach())
                towards_hidden.append(torch.stack([slope @ weight for slope in slopes]))
                towards_logits += [(hidden, slopes)] if keep else []
        ctx.save_for_backward(torch.cat(towards_hidden, dim=1))
        ctx.towards_logits, ctx.chunk = towards_logits, chunk
        ctx.types = hidden_ND.dtype, weight_VD.dtype
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (slopes_KND,) = ctx.saved_tensors
        grad_KN1 = (grad.T if grad.ndim > 1 else grad[None])[..., None].to(slopes_KND.dtype)
        grad_ND = (slopes_KND * grad_KN1).sum(0).to(ctx.types[0])
        grad_VD = None
        for (hidden, slopes), scale_KN1 in zip(
            ctx.towards_logits, grad_KN1.split(ctx.chunk, dim=1), strict=bool(ctx.towards_logits)
        ):
            for slope, scale in zip(slopes, scale_KN1, strict=True):
                part = slope.T @ (hidden * scale)
                grad_VD = part.to(ctx.types[1]) if grad_VD is None else grad_VD.add_(part)
        ctx.towards_logits = []
        return grad_ND, grad_VD, None, None, None, None


@lru_cache
def _adjusted(token_function: TokenFunction, scale: float | None, softcap: float | None) -> TokenFunction:
    return partial(_of_adjusted, token_function, scale, softcap)


def _of_adjusted(
    token_function: TokenFunction, scale: float | None, softcap: float | None, logits_NV: Tensor, targets_N: Tensor
) -> Tensor:
    if scale is not None:
        logits_NV = logits_NV * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return token_function(logits_NV, targets_N)


@lru_cache
def _compiled(token_function: TokenFunction) -> TokenFunction:
    return torch.compile(token_function)

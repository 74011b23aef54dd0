"""Stages that learn from text: the tokens of answers (sft), or all tokens (pretrain)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raytune_llm.config.stage import SFT, Pretrain
from raytune_llm.losses.perplexity import perplexity
from raytune_llm.losses.routing import load_balance
from raytune_llm.losses.tokens import asft, cross_entropy, dft, eaft, token_correct, token_entropy, total_and_count
from raytune_llm.models.attention.documents import document_numbers
from raytune_llm.records import Batch, LossOut
from raytune_llm.stages.objective import Objective


@dataclass(frozen=True, slots=True)
class TokenLoss:
    of: Callable[..., Tensor]
    """(logits_NV, targets_N) -> [N]"""
    is_nll: bool = False
    """The loss is the negative log-likelihood itself, so that this metric need not be computed."""
    beside_reference: bool = False
    """The loss also needs the reference's logits."""


def _cross_entropy(section: SFT | Pretrain) -> TokenLoss:
    smoothing = section.label_smoothing if isinstance(section, SFT) else 0.0
    loss = partial(cross_entropy, label_smoothing=smoothing, z_loss=section.z_loss)
    return TokenLoss(loss, is_nll=not smoothing and not section.z_loss)


def _eaft(section: SFT) -> TokenLoss:
    assert section.eaft_alpha is not None
    return TokenLoss(partial(eaft, alpha=section.eaft_alpha))


def _asft(section: SFT) -> TokenLoss:
    assert section.asft_alpha is not None
    return TokenLoss(partial(_anchored, alpha=section.asft_alpha), beside_reference=True)


LOSSES: dict[str, Callable[[SFT], TokenLoss]] = {
    "cross_entropy": _cross_entropy,
    "dft": lambda section: TokenLoss(dft),
    "eaft": _eaft,
    "asft": _asft,
}


def sft(section: SFT) -> Objective:
    return _objective(LOSSES[section.loss](section), section.router_aux_loss_coef, neftune_alpha=section.neftune_alpha)


def pretrain(section: Pretrain) -> Objective:
    return _objective(_cross_entropy(section), section.router_aux_loss_coef, derived=_perplexity)


def _objective(
    loss: TokenLoss, router_aux_loss_coef: float | None, *, neftune_alpha: float | None = None, **rest: Any
) -> Objective:
    asked: dict[str, Any] = {"beside_reference": True} if loss.beside_reference else {}
    if neftune_alpha is not None:
        asked["neftune_alpha"] = neftune_alpha
    values = partial(_observed, loss)  # one object for the run: it is compiled once
    return Objective(loss=partial(_next_token, values=values, asked=asked, router_aux_loss_coef=router_aux_loss_coef), **rest)


def _next_token(
    model: nn.Module,
    batch: Batch,
    *,
    values: Callable[..., tuple[Tensor, ...]],
    asked: Mapping[str, Any],
    router_aux_loss_coef: float | None,
) -> LossOut:
    """The weighted sum of the trained tokens' losses, in nats.

    With a load-balancing loss, each document's value is weighted like its trained tokens, so that it has the same divisor and
    does not depend on the rest of the batch.
    """
    if router_aux_loss_coef is None:
        values_NK = model(batch, values, **asked)
        loss_N, metrics = values_NK[:, 0], {}
    else:
        values_NK, router_logits, top_k = model(batch, values, routers=True, **asked)
        balance_N = _balance(router_logits, top_k, batch)
        loss_N = values_NK[:, 0] + router_aux_loss_coef * balance_N
        metrics = {"router_aux_loss": (balance_N.detach().sum(), len(balance_N))}
    seen = values_NK[:, 1:].detach().unbind(1)
    metrics |= {name: (value_N.sum(), len(value_N)) for name, value_N in zip(METRICS, seen, strict=False)}
    total, count = total_and_count(loss_N, batch.per_token.get("weights"))
    return LossOut(total=total, count=count, metrics=metrics)


METRICS = ("token_accuracy", "entropy", "nll")


def _observed(loss: TokenLoss, logits_NV: Tensor, targets_N: Tensor, *reference_NV: Tensor) -> tuple[Tensor, ...]:
    """The loss, then METRICS. nll is left out if the loss is the negative log-likelihood."""
    loss_N = loss.of(logits_NV, targets_N, *reference_NV)
    with torch.no_grad():
        seen = [token_correct(logits_NV, targets_N).to(loss_N.dtype), token_entropy(logits_NV)]
        if not loss.is_nll:
            seen.append(cross_entropy(logits_NV, targets_N))
    return loss_N, *seen


def _anchored(logits_NV: Tensor, targets_N: Tensor, reference_NV: Tensor, *, alpha: float) -> Tensor:
    return asft(logits_NV, targets_N, reference_logits_NV=reference_NV, alpha=alpha)


def _balance(router_logits: Tensor, top_k: int, batch: Batch) -> Tensor:
    """[N]: the load-balancing loss of each trained token's document, as the mean over layers."""
    B, T = batch.ids_BT.shape
    document_T = document_numbers(batch.cu_seqlens_S, B, T).flatten() - 1
    num_documents = len(batch.cu_seqlens_S) - 1
    layers = [load_balance(logits_TE, document_T, num_documents, top_k=top_k) for logits_TE in router_logits]
    return torch.stack(layers).mean(0)[document_T[batch.trained_N]]


def _perplexity(means: Mapping[str, float]) -> dict[str, float]:
    return {"perplexity": perplexity(means.get("nll", means["loss"]))}

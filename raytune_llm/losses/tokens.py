"""Losses, log-probabilities and entropies of tokens: one value per token in nats, and sums over documents.

Every function takes logits_NV and targets_N of the trained positions only, so that a head can call it on a chunk of them.
Arithmetic is in float32, or in float64 if the logits are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target [N] under softmax(logits / temperature)."""
    target_N, log_z_N = _target_and_log_z(_wide(logits_NV, temperature), targets_N)
    return target_N - log_z_N


def token_entropy(logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy [N] of softmax(logits / temperature)."""
    wide_NV = _wide(logits_NV, temperature)
    return _entropy(wide_NV) if torch.compiler.is_compiling() else _Entropy.apply(wide_NV)


def token_correct(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Whether each target is the most likely token: bool [N], for token accuracy."""
    return logits_NV.argmax(-1) == targets_N


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Negative log-likelihood of each target [N].

    label_smoothing e: (1 - e) nll - e mean_v log p_v (Szegedy et al. 2016, arXiv 1512.00567).
    z_loss c: adds c log(Z)^2, where Z is the softmax normaliser (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """
    wide_NV = _wide(logits_NV)
    target_N, log_z_N = _target_and_log_z(wide_NV, targets_N)
    loss_N = log_z_N - (1 - label_smoothing) * target_N
    if label_smoothing:
        loss_N = loss_N - label_smoothing * wide_NV.mean(-1)
    return loss_N + z_loss * log_z_N.square() if z_loss else loss_N


def dft(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Dynamic fine-tuning: stop_grad(p) nll [N], p the target's probability (Wu et al. 2025, arXiv 2508.05629)."""
    nll_N = cross_entropy(logits_NV, targets_N)
    return nll_N * (-nll_N.detach()).exp()


def eaft(logits_NV: Tensor, targets_N: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Entropy-adaptive fine-tuning: (H / 3)^alpha nll [N], so that tokens with a confident prediction change the model less (Diao
    et al. 2026, arXiv 2601.02151).

    H, without gradient, is the entropy of the distribution over the 20 largest logits (or all, if there are fewer). 3 is about
    log 20, its maximum.
    """
    with torch.no_grad():
        top_NK = logits_NV.topk(min(20, logits_NV.shape[-1]), dim=-1).values
        # not token_entropy, which rounding can make negative, so that its power would be NaN
        weight_N = (_entropy(_wide(top_NK)) / 3.0).pow(alpha)
    return weight_N * cross_entropy(logits_NV, targets_N)


def asft(logits_NV: Tensor, targets_N: Tensor, *, reference_logits_NV: Tensor, alpha: float) -> Tensor:
    """Anchored SFT: DFT plus alpha KL(reference || policy) [N], reference detached (Zhu et al. 2025, arXiv 2509.23753)."""
    return dft(logits_NV, targets_N) + alpha * token_kl(reference_logits_NV.detach(), logits_NV)


def token_kl(p_logits_NV: Tensor, q_logits_NV: Tensor) -> Tensor:
    """KL(p || q) [N] between the two next-token distributions."""
    p_logprobs_NV, q_logprobs_NV = (F.log_softmax(_wide(logits_NV), dim=-1) for logits_NV in (p_logits_NV, q_logits_NV))
    # tokens with p = 0 add 0; 0 * inf would be NaN
    gap_NV = (p_logprobs_NV - q_logprobs_NV).masked_fill(p_logprobs_NV == -torch.inf, 0.0)
    return (p_logprobs_NV.exp() * gap_NV).sum(-1)


def total_and_count(values_N: Tensor, weights_N: Tensor | None = None) -> tuple[Tensor, Tensor | int]:
    """The (weighted) sum of the values, and its divisor: the number of values, or the sum of their weights."""
    if weights_N is None:
        return values_N.sum(), values_N.numel()
    return (values_N * weights_N).sum(), weights_N.sum()


def segment_sums(values_N: Tensor, document_N: Tensor, num_documents: int) -> Tensor:
    """The sum of each document's values [M], 0 if it has none. document_N: the number of the document of each value."""
    return values_N.new_zeros(num_documents).index_add(0, document_N, values_N)


def segment_counts(document_N: Tensor, num_documents: int) -> Tensor:
    """int64 [M]: the number of values of each document."""
    return segment_sums(torch.ones_like(document_N, dtype=torch.int64), document_N, num_documents)


def split_sums(values_N: Tensor, document_N: Tensor, shared_tokens_M: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the first shared_tokens_M[m] values of each document, and over the rest: (head_M, tail_M).

    LD-DPO (Liu et al. 2024, arXiv 2409.06411) uses head + alpha tail as the log-probability of an answer, where shared_tokens is
    the shorter answer's length, so that extra tokens of the longer answer count less. It must be applied to policy and reference
    alike. document_N must not decrease.
    """
    num_documents = shared_tokens_M.shape[0]
    counts_M = segment_counts(document_N, num_documents)
    starts_M = counts_M.cumsum(0) - counts_M
    offset_N = torch.arange(len(document_N), device=document_N.device) - starts_M[document_N]
    in_head_N = offset_N < shared_tokens_M[document_N]
    head_M = segment_sums(values_N.where(in_head_N, 0.0), document_N, num_documents)
    tail_M = segment_sums(values_N.where(~in_head_N, 0.0), document_N, num_documents)
    return head_M, tail_M


def _wide(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return wide_NV if temperature == 1.0 else wide_NV / temperature


def _target_and_log_z(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The target's logit [N], and the logsumexp over the vocabulary [N]."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula better
        return _at(logits_NV, targets_N), logits_NV.logsumexp(-1)
    return _TargetAndLogZ.apply(logits_NV, targets_N)


def _entropy(logits_NV: Tensor) -> Tensor:
    logprobs_NV = F.log_softmax(logits_NV, dim=-1)
    # the clamp: a token with a logit of -inf adds 0; 0 * -inf would be NaN
    return -(logprobs_NV.exp() * logprobs_NV.clamp(min=torch.finfo(logprobs_NV.dtype).min)).sum(-1)


# Autograd would need eight or more passes over the vocabulary, most of them to new memory; these need half as many. log Z is the
# largest logit minus the logarithm of its probability, each exact to one rounding, and the gradient of log Z is the softmax.


class _TargetAndLogZ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        softmax_NV, log_z_N = _softmax_and_log_z(logits_NV)
        ctx.save_for_backward(softmax_NV, targets_N)
        return _at(logits_NV, targets_N), log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, target_grad_N: Tensor, log_z_grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        softmax_NV, targets_N = ctx.saved_tensors
        grad_NV = softmax_NV * log_z_grad_N.unsqueeze(-1)
        return grad_NV.scatter_add_(-1, targets_N.unsqueeze(-1), target_grad_N.unsqueeze(-1)), None


class _Entropy(torch.autograd.Function):
    """The entropy as log Z minus the mean logit under softmax. Its gradient is -p (log p + entropy)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor) -> Tensor:
        softmax_NV, log_z_N = _softmax_and_log_z(logits_NV)
        entropy_N = log_z_N - softmax_NV.mul_(logits_NV).nansum(-1)  # a logit of -inf adds 0; 0 * -inf is NaN
        ctx.save_for_backward(logits_NV, log_z_N, entropy_N)
        return entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> Tensor:  # type: ignore[override]
        logits_NV, log_z_N, entropy_N = ctx.saved_tensors
        logprobs_NV = (logits_NV - log_z_N.unsqueeze(-1)).clamp_(min=torch.finfo(logits_NV.dtype).min)
        softmax_NV = logprobs_NV.exp()
        return logprobs_NV.add_(entropy_N.unsqueeze(-1)).mul_(softmax_NV).mul_(-grad_N.unsqueeze(-1))


def _softmax_and_log_z(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    softmax_NV = logits_NV.softmax(-1)
    return softmax_NV, logits_NV.amax(-1) - softmax_NV.amax(-1).log()


def _at(values_NV: Tensor, targets_N: Tensor) -> Tensor:
    return values_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)

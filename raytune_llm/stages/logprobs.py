"""Log-probabilities of answers, in nats, from a forward pass over the documents that hold them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytune_llm.losses.tokens import segment_counts, segment_sums, split_sums, token_logprobs
from raytune_llm.records import AnswerBatch, PairBatch


def pair_logprobs(model: nn.Module, batch: PairBatch, *, ld_alpha: float | None = None) -> Tensor:
    """[P, 2]: sums over the tokens of the chosen and of the rejected answer.

    ld_alpha weighs the tokens past the shorter answer's length (LD-DPO, arXiv 2409.06411); None weighs them like the others.
    """
    logprobs_N = model(batch, token_logprobs)
    num_documents = len(batch.cu_seqlens_S) - 1
    if ld_alpha is None:
        sums_M = segment_sums(logprobs_N, batch.documents_N, num_documents)
    else:
        shared_P = pair_tokens(batch).amin(1)
        shared_M = torch.zeros(num_documents, dtype=shared_P.dtype, device=shared_P.device)
        shared_M = shared_M.index_copy(0, batch.chosen_P, shared_P).index_copy(0, batch.rejected_P, shared_P)
        head_M, tail_M = split_sums(logprobs_N, batch.documents_N, shared_M)
        sums_M = head_M + ld_alpha * tail_M
    return torch.stack([sums_M[batch.chosen_P], sums_M[batch.rejected_P]], dim=1)


def answer_logprobs(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """[P]: sums over the tokens of each answer."""
    return segment_sums(model(batch, token_logprobs), batch.documents_N, len(batch.cu_seqlens_S) - 1)[batch.answers_P]


def pair_tokens(batch: PairBatch) -> Tensor:
    """int64 [P, 2]: trained tokens of the chosen and of the rejected answer."""
    counts_M = segment_counts(batch.documents_N, len(batch.cu_seqlens_S) - 1)
    return torch.stack([counts_M[batch.chosen_P], counts_M[batch.rejected_P]], dim=1)


def answer_tokens(batch: AnswerBatch) -> Tensor:
    """int64 [P]: trained tokens of each answer."""
    return segment_counts(batch.documents_N, len(batch.cu_seqlens_S) - 1)[batch.answers_P]

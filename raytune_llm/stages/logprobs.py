"""Log-probabilities of answers, in nats, from a forward pass over the documents that hold them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytune_llm.losses.tokens import segment_counts, segment_sums, split_sums, token_logprobs
from raytune_llm.records import Batch


def answer_logprobs(model: nn.Module, batch: Batch, *, ld_alpha: float | None = None) -> Tensor:
    """[P, sides]: the log-probability of each answer, summed over its tokens. sides: chosen and rejected, or the only answer.

    ld_alpha: the weight of tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411); None: 1.
    """
    logprobs_N = model(batch, token_logprobs)
    num_documents, documents_PS = len(batch.cu_seqlens_S) - 1, batch.per_answer["documents"]
    if ld_alpha is None:
        sums_M = segment_sums(logprobs_N, batch.per_token["documents"], num_documents)
    else:
        shared_PS = answer_tokens(batch).amin(1, keepdim=True).expand_as(documents_PS)
        shared_M = torch.zeros(num_documents, dtype=shared_PS.dtype, device=shared_PS.device)
        shared_M = shared_M.index_copy(0, documents_PS.flatten(), shared_PS.flatten())
        head_M, tail_M = split_sums(logprobs_N, batch.per_token["documents"], shared_M)
        sums_M = head_M + ld_alpha * tail_M
    return sums_M[documents_PS]


def answer_tokens(batch: Batch) -> Tensor:
    """int64 [P, sides]: the number of trained tokens of each answer."""
    return segment_counts(batch.per_token["documents"], len(batch.cu_seqlens_S) - 1)[batch.per_answer["documents"]]

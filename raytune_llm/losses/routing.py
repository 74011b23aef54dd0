"""The load-balancing loss for routers of a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance(router_logits_TE: Tensor, document_T: Tensor, num_documents: int, *, top_k: int) -> Tensor:
    """E sum_e f_e P_e for each document [M] (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6). f_e is the fraction of its tokens
    that go to expert e, P_e the mean probability that the router gives the expert. The value is top_k if all experts are used
    equally, and at most E.

    Switch computes f and P over a batch, so that the loss depends on how a step is split. Here they are computed over each
    document, as in DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, eq. 17 to 20).
    """
    probs_TE = router_logits_TE.float().softmax(-1)
    used_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(top_k, dim=-1).indices, 1.0)
    num_experts = probs_TE.shape[1]
    tokens_M1 = probs_TE.new_zeros(num_documents, 1).index_add(0, document_T, torch.ones_like(probs_TE[:, :1])).clamp(min=1)
    f_ME, p_ME = (x.new_zeros(num_documents, num_experts).index_add(0, document_T, x) / tokens_M1 for x in (used_TE, probs_TE))
    return num_experts * (f_ME * p_ME).sum(1)

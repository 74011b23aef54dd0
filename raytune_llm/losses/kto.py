"""Losses over single answers that are desirable or undesirable: one value per document [M], unreduced.

The loss of a step is the mean over all documents of the global batch, independent of their weights and verdicts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto(
    ratio_M: Tensor,
    desirable_M: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306), with h = log policy - log reference of an answer:

        desirable:    w_d (1 - s(b (h - z)))
        undesirable:  w_u (1 - s(b (z - h)))

    ratio_M is h in nats, summed over the answer's tokens; desirable_M is bool; kl is z (reference_point), one value for the whole
    global batch. The paper keeps (w_d desirable rows) / (w_u undesirable rows) between 1 and 4/3.
    """
    gain_M = beta * (ratio_M - kl)
    return torch.where(
        desirable_M,
        desirable_weight * torch.sigmoid(-gain_M),
        undesirable_weight * torch.sigmoid(gain_M),
    )


def apo_zero_unpaired(
    ratio_M: Tensor,
    desirable_M: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO with z = 0 (D'Oosterlinck et al. 2024, arXiv 2408.06266). kl is ignored, so mismatched answers need not be computed."""
    return kto(ratio_M, desirable_M, 0.0, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


KTO_LOSSES = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}
LOSSES_WITH_KL = frozenset({"kto"})


def reference_point(ratio_total: Tensor, count: Tensor | int) -> Tensor:
    """z = max(0, mean log-ratio of mismatched answers), an estimate of KL(policy || reference), without gradient.

    ratio_total, count: the sum and the count over all ranks and micro-batches, since the clamp must come after the mean.
    """
    return (ratio_total.detach() / count).clamp(min=0)


def desirable_nll(
    policy_M: Tensor, tokens_M: Tensor, desirable_M: Tensor, *, rows_per_desirable: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy of each desirable answer as a mean over its tokens [M], and 0 for the others. It is added with sft_weight.

    It is scaled so that its mean over all rows equals the mean over desirable rows. rows_per_desirable: the number of rows of the
    global batch divided by its number of desirable rows (any number if there are none); None: these rows are the global batch.
    """
    nll_M = torch.where(desirable_M, -policy_M / tokens_M, 0.0)
    if rows_per_desirable is None:
        return nll_M * len(nll_M) / desirable_M.sum().clamp(min=1)
    return nll_M * rows_per_desirable


def kto_metrics(
    ratio_M: Tensor, policy_M: Tensor, desirable_M: Tensor, kl: Tensor, *, beta: float
) -> dict[str, tuple[Tensor, Tensor | int]]:
    """Sums and counts of KTO's usual metrics, by verdict, without gradient. kl: z, one value or one per row; 0 if it is not used.

    A side without rows has a count of 0. `rewards/margins` is not among them: it is the difference of the two sides' means over
    all ranks.
    """
    reward_M, policy_M = beta * ratio_M.detach(), policy_M.detach()
    metrics: dict[str, tuple[Tensor, Tensor | int]] = {"kl": (kl.detach().expand_as(ratio_M).sum(), len(ratio_M))}
    for side, on_side_M in (("chosen", desirable_M), ("rejected", ~desirable_M)):
        metrics[f"rewards/{side}"] = (reward_M.where(on_side_M, 0.0).sum(), on_side_M.sum())
        metrics[f"logps/{side}"] = (policy_M.where(on_side_M, 0.0).sum(), on_side_M.sum())
    return metrics

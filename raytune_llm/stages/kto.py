"""The KTO stage: learns from single answers that are labelled desirable or undesirable."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from raytune_llm.config.stage import KTO
from raytune_llm.losses.kto import KTO_LOSSES, LOSSES_WITH_KL, desirable_nll, kto_metrics, reference_point
from raytune_llm.records import Batch, LossOut
from raytune_llm.stages.logprobs import answer_logprobs, answer_tokens
from raytune_llm.stages.objective import GlobalStatistics, Objective


def kto(section: KTO) -> Objective:
    has_kl = section.loss in LOSSES_WITH_KL
    return Objective(
        loss=partial(_loss, section=section),
        statistics=GlobalStatistics(values=_drifts if has_kl else _verdicts, reduce=_reference_point),
        reference=partial(_logps, mismatched=has_kl),
        derived=_margin,
    )


def _margin(means: Mapping[str, float]) -> dict[str, float]:
    """rewards/margins: the difference of the means of the two sides, if both have rows."""
    sides = [means[name] for name in ("rewards/chosen", "rewards/rejected") if name in means]
    return {"rewards/margins": sides[0] - sides[1]} if len(sides) == 2 else {}


def _logps(model: nn.Module, batch: Batch, *, mismatched: bool) -> Tensor:
    """[P, 2]: log-probabilities of the row's own answer and, if the loss uses it, of the mismatched one."""
    own_P1 = answer_logprobs(model, batch)
    others_P1 = answer_logprobs(model, batch.beside["mismatched"]) if mismatched else torch.zeros_like(own_P1)
    return torch.cat([own_P1, others_P1], dim=1)


def _verdicts(model: nn.Module, batch: Batch) -> Tensor:
    """[P, 2]: zeros, since this loss needs no log-ratios, and the verdicts."""
    desirable_P = batch.per_answer["desirable"].double()
    return torch.stack([torch.zeros_like(desirable_P), desirable_P], dim=1)


def _drifts(model: nn.Module, batch: Batch) -> Tensor:
    """[P, 2]: log-ratios of the mismatched answers, and the verdicts."""
    policy_P = answer_logprobs(model, batch.beside["mismatched"]).squeeze(1)
    ratio_P = policy_P - batch.per_answer["reference"][:, 1]
    return torch.stack([ratio_P.double(), batch.per_answer["desirable"].double()], dim=1)


def _reference_point(values_A2: Tensor, state: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The reference point z of the global batch, and its number of rows divided by its number of desirable rows."""
    ratio_A, desirable_A = values_A2.unbind(1)
    kl = reference_point(ratio_A.sum(), len(ratio_A))
    rows_per_desirable = len(desirable_A) / desirable_A.sum().clamp(min=1)
    return {"kl": kl.expand_as(ratio_A), "rows_per_desirable": rows_per_desirable.expand_as(ratio_A)}, state


def _loss(model: nn.Module, batch: Batch, *, section: KTO) -> LossOut:
    policy_P, desirable_P = answer_logprobs(model, batch).squeeze(1), batch.per_answer["desirable"]
    ratio_P = policy_P - batch.per_answer["reference"][:, 0]
    kl_P = batch.per_answer["kl"].to(policy_P.dtype)
    loss_P = KTO_LOSSES[section.loss](
        ratio_P,
        desirable_P,
        kl_P,
        beta=section.beta,
        desirable_weight=section.desirable_weight,
        undesirable_weight=section.undesirable_weight,
    )
    if section.sft_weight:
        loss_P = loss_P + section.sft_weight * desirable_nll(
            policy_P,
            answer_tokens(batch).squeeze(1),
            desirable_P,
            rows_per_desirable=batch.per_answer["rows_per_desirable"].to(policy_P.dtype),
        )
    metrics = kto_metrics(ratio_P, policy_P, desirable_P, kl_P, beta=section.beta)
    return LossOut(total=loss_P.sum(), count=len(loss_P), metrics=metrics)

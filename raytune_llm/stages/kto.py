"""Learning from single answers with a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from raytune_llm.config.stage import KTO
from raytune_llm.losses.kto import KTO_LOSSES, LOSSES_WITH_KL, desirable_nll, kto_metrics, reference_point
from raytune_llm.records import LabeledBatch, LossOut
from raytune_llm.stages.logprobs import answer_logprobs, answer_tokens
from raytune_llm.stages.objective import Coupling, Objective


def kto(section: KTO) -> Objective:
    has_kl = section.loss in LOSSES_WITH_KL
    return Objective(
        loss=partial(_loss, section=section),
        coupling=Coupling(values=_drifts if has_kl else _verdicts, settle=_reference_point),
        reference=partial(_logps, mismatched=has_kl),
        derived=_margin,
    )


def _margin(means: Mapping[str, float]) -> dict[str, float]:
    """The margin is between the means of the two sides, where both have rows."""
    sides = [means[name] for name in ("rewards/chosen", "rewards/rejected") if name in means]
    return {"rewards/margins": sides[0] - sides[1]} if len(sides) == 2 else {}


def _logps(model: nn.Module, batch: LabeledBatch, *, mismatched: bool) -> Tensor:
    own_P = answer_logprobs(model, batch)
    others_P = answer_logprobs(model, batch.mismatched) if mismatched else torch.zeros_like(own_P)
    return torch.stack([own_P, others_P], dim=1)


def _verdicts(model: nn.Module, batch: LabeledBatch) -> Tensor:
    """[P, 2]: no log-ratio, and the verdicts."""
    desirable_P = batch.desirable_P.double()
    return torch.stack([torch.zeros_like(desirable_P), desirable_P], dim=1)


def _drifts(model: nn.Module, batch: LabeledBatch) -> Tensor:
    """[P, 2]: log-ratios of the mismatched answers, and the verdicts."""
    assert batch.reference_P2 is not None
    ratio_P = answer_logprobs(model, batch.mismatched) - batch.reference_P2[:, 1]
    return torch.stack([ratio_P.double(), batch.desirable_P.double()], dim=1)


def _reference_point(values_A2: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """[A, 2]: z of the whole batch, and its rows over its desirable ones."""
    ratio_A, desirable_A = values_A2.unbind(1)
    kl = reference_point(ratio_A.sum(), len(ratio_A))
    rows_per_desirable = len(desirable_A) / desirable_A.sum().clamp(min=1)
    return torch.stack([kl, rows_per_desirable]).expand(len(values_A2), 2), state


def _loss(model: nn.Module, batch: LabeledBatch, *, section: KTO) -> LossOut:
    assert batch.reference_P2 is not None and batch.whole_PJ is not None
    policy_P = answer_logprobs(model, batch)
    ratio_P = policy_P - batch.reference_P2[:, 0]
    kl_P, rows_per_desirable_P = batch.whole_PJ.to(policy_P.dtype).unbind(1)
    loss_P = KTO_LOSSES[section.loss](
        ratio_P,
        batch.desirable_P,
        kl_P,
        beta=section.beta,
        desirable_weight=section.desirable_weight,
        undesirable_weight=section.undesirable_weight,
    )
    if section.sft_weight:
        loss_P = loss_P + section.sft_weight * desirable_nll(
            policy_P, answer_tokens(batch), batch.desirable_P, rows_per_desirable=rows_per_desirable_P
        )
    metrics = kto_metrics(ratio_P, policy_P, batch.desirable_P, kl_P, beta=section.beta)
    return LossOut(total=loss_P.sum(), count=len(loss_P), metrics=metrics)

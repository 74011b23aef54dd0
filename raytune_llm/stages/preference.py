"""Stages that learn from pairs of answers: DPO and its variants with a reference; ORPO, SimPO and CPO without.

Most losses depend on one pair at a time. Those in GLOBAL_LOSSES depend on all pairs of a global batch: a first pass computes the
log-probabilities of every pair, the loss is computed on all of them at once, and the second pass backpropagates the loss's
derivative for each log-probability, which gives the gradient of the whole (Gao et al. 2021, arXiv 2101.06983, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from raytune_llm.config.stage import CPO, DPO, DPO_READS, ORPO, SimPO
from raytune_llm.losses.preference import (
    PairLogprobs,
    RunningMean,
    Term,
    mean_rewards,
    preference_metrics,
    rewards,
    weighted_sum,
)
from raytune_llm.records import Batch, LossOut
from raytune_llm.stages.logprobs import answer_logprobs, answer_tokens
from raytune_llm.stages.objective import GlobalStatistics, Objective, StageLoss

Logps = Callable[[nn.Module, Batch], Tensor]
Rewards = Callable[[PairLogprobs], tuple[Tensor, Tensor]]

ARGUMENTS = {"discopop_tau": "tau", "f_alpha": "alpha"}
"""Setting of DPO -> the name of the loss function's argument, if it differs."""
GLOBAL_LOSSES = {"aot", "aot_unpaired", "aot_pair", "bco_pair"}
"""Losses that need the log-probabilities of all pairs of a global batch."""


def dpo(section: DPO) -> Objective:
    given = {
        "beta": section.beta,
        "label_smoothing": section.label_smoothing,
        "discopop_tau": section.discopop_tau,
        "f_alpha": section.f_alpha,
    }
    weights = {section.loss: 1.0} if isinstance(section.loss, str) else section.loss
    terms = [
        Term(name, {ARGUMENTS.get(setting, setting): given[setting] for setting in DPO_READS[name]}, weight)
        for name, weight in weights.items()
    ]
    if section.sft_weight:
        terms.append(Term("chosen_nll", weight=section.sft_weight))
    return _objective(
        terms,
        partial(rewards, beta=section.beta),
        logps=partial(answer_logprobs, ld_alpha=section.ld_alpha),
        has_reference=section.reference != "none",
    )


def orpo(section: ORPO) -> Objective:
    return _objective([Term("orpo", {"beta": section.beta})], partial(mean_rewards, beta=section.beta))


def simpo(section: SimPO) -> Objective:
    settings = {"beta": section.beta, "gamma": section.gamma, "label_smoothing": section.label_smoothing}
    terms = [Term("simpo", settings), *_sft(section.sft_weight)]
    return _objective(terms, partial(mean_rewards, beta=section.beta))


def cpo(section: CPO) -> Objective:
    settings = {"beta": section.beta, "label_smoothing": section.label_smoothing}
    return _objective([Term("cpo", settings), *_sft(section.sft_weight)], partial(rewards, beta=section.beta))


def _sft(weight: float) -> list[Term]:
    return [Term("sft", weight=weight)] if weight else []


def _objective(
    terms: Sequence[Term], rewards: Rewards, *, logps: Logps = answer_logprobs, has_reference: bool = False
) -> Objective:
    names = {term.loss for term in terms}
    pairs_of = partial(_pairs, logps=logps, has_reference=has_reference)
    loss: StageLoss = partial(_loss, pairs_of=pairs_of, terms=terms, rewards=rewards)
    statistics = None
    if names & GLOBAL_LOSSES:
        loss = partial(_global_loss, pairs_of=pairs_of, rewards=rewards)
        reduce = partial(_slopes, terms=terms, rewards=rewards)
        statistics = GlobalStatistics(values=partial(_columns, pairs_of=pairs_of), reduce=reduce, state=(0.0, 0.0))
    elif "sft" in names:
        statistics = GlobalStatistics(values=_chosen_tokens, reduce=_mean_chosen_tokens)
    return Objective(
        loss=loss,
        statistics=statistics,
        reference=logps if has_reference else None,
    )


def _pairs(model: nn.Module, batch: Batch, *, logps: Logps, has_reference: bool) -> PairLogprobs:
    policy_P2 = logps(model, batch)
    reference_P2 = batch.per_answer["reference"] if has_reference else torch.zeros_like(policy_P2)
    return PairLogprobs(*policy_P2.unbind(1), *reference_P2.unbind(1), *answer_tokens(batch).unbind(1))


def _loss(
    model: nn.Module,
    batch: Batch,
    *,
    pairs_of: Callable[[nn.Module, Batch], PairLogprobs],
    terms: Sequence[Term],
    rewards: Rewards,
) -> LossOut:
    pairs = pairs_of(model, batch)
    if (mean_chosen_tokens := batch.per_answer.get("mean_chosen_tokens")) is not None:
        pairs = replace(pairs, mean_chosen_tokens=mean_chosen_tokens.to(pairs.chosen_P.dtype))
    loss_P = weighted_sum(pairs, terms)
    return LossOut(total=loss_P.sum(), count=len(loss_P), metrics=preference_metrics(pairs, *rewards(pairs)))


def _chosen_tokens(model: nn.Module, batch: Batch) -> Tensor:
    return answer_tokens(batch)[:, :1].double()


def _mean_chosen_tokens(tokens_A1: Tensor, state: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {"mean_chosen_tokens": tokens_A1.mean(0).expand(len(tokens_A1))}, state


def _global_loss(
    model: nn.Module, batch: Batch, *, pairs_of: Callable[[nn.Module, Batch], PairLogprobs], rewards: Rewards
) -> LossOut:
    pairs = pairs_of(model, batch)
    loss_P, slopes_P2 = batch.per_answer["loss"], batch.per_answer["slopes"]
    chosen_slope_P, rejected_slope_P = slopes_P2.unbind(1)
    line_P = chosen_slope_P * pairs.chosen_P + rejected_slope_P * pairs.rejected_P
    total = line_P.sum() + (loss_P - line_P.detach()).sum()  # the loss's value, the line's gradient
    return LossOut(total=total, count=len(loss_P), metrics=preference_metrics(pairs, *rewards(pairs)))


def _columns(model: nn.Module, batch: Batch, *, pairs_of: Callable[[nn.Module, Batch], PairLogprobs]) -> Tensor:
    """[P, 6]: the values of a PairLogprobs."""
    pairs = pairs_of(model, batch)
    return torch.stack(
        [
            pairs.chosen_P,
            pairs.rejected_P,
            pairs.reference_chosen_P,
            pairs.reference_rejected_P,
            pairs.chosen_tokens_P.to(pairs.chosen_P.dtype),
            pairs.rejected_tokens_P.to(pairs.chosen_P.dtype),
        ],
        dim=1,
    )


def _slopes(values_A6: Tensor, state: Tensor, *, terms: Sequence[Term], rewards: Rewards) -> tuple[dict[str, Tensor], Tensor]:
    """Each pair's loss [A], and the derivatives of the summed loss with respect to its two log-probabilities [A, 2].

    The state is a RunningMean of rewards. bco_pair uses it with this batch included.
    """
    with torch.enable_grad():
        chosen_A, rejected_A, *others = values_A6.unbind(1)
        chosen_A, rejected_A = chosen_A.clone().requires_grad_(), rejected_A.clone().requires_grad_()
        pairs = PairLogprobs(chosen_A, rejected_A, *others)
        both_2A = torch.stack(rewards(pairs)).double()
        running = RunningMean(*state.unbind()).with_batch(both_2A.sum(), both_2A.numel())
        loss_A = weighted_sum(replace(pairs, reward_mean=running.mean), terms)
        slopes = torch.autograd.grad(loss_A.sum(), (chosen_A, rejected_A))
    state = torch.stack([running.mean, running.num_batches])  # type: ignore[list-item]
    return {"loss": loss_A.detach(), "slopes": torch.stack(slopes, dim=1)}, state

"""Learning from pairs of answers: DPO and its family with a reference, ORPO, SimPO and CPO without.

Most losses are of one pair at a time. Those in OF_THE_WHOLE are of all pairs of a global batch together: there, a first pass
takes every pair's log-probabilities, the loss is computed on all of them at once, and the second pass carries each one's slope
back into the model, which gives the gradient of the whole (Gao et al. 2021, arXiv 2101.06983, section 3.2).
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
from raytune_llm.records import LossOut, PairBatch
from raytune_llm.stages.logprobs import pair_logprobs, pair_tokens
from raytune_llm.stages.objective import Coupling, Objective, StageLoss

Logps = Callable[[nn.Module, PairBatch], Tensor]
Rewards = Callable[[PairLogprobs], tuple[Tensor, Tensor]]

ARGUMENTS = {"discopop_tau": "tau", "f_alpha": "alpha"}
"""Settings of DPO -> how their loss calls them, where that is shorter."""
OF_THE_WHOLE = {"aot", "aot_unpaired", "aot_pair", "bco_pair"}
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
        logps=partial(pair_logprobs, ld_alpha=section.ld_alpha),
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
    terms: Sequence[Term], rewards: Rewards, *, logps: Logps = pair_logprobs, has_reference: bool = False
) -> Objective:
    names = {term.loss for term in terms}
    pairs_of = partial(_pairs, logps=logps, has_reference=has_reference)
    loss: StageLoss = partial(_loss, pairs_of=pairs_of, terms=terms, rewards=rewards)
    coupling = None
    if names & OF_THE_WHOLE:
        loss = partial(_loss_of_the_whole, pairs_of=pairs_of, rewards=rewards)
        settle = partial(_slopes, terms=terms, rewards=rewards)
        coupling = Coupling(values=partial(_columns, pairs_of=pairs_of), settle=settle, state=(0.0, 0.0))
    elif "sft" in names:
        coupling = Coupling(values=_chosen_tokens, settle=_mean_chosen_tokens)
    return Objective(
        loss=loss,
        coupling=coupling,
        reference=logps if has_reference else None,
    )


def _pairs(model: nn.Module, batch: PairBatch, *, logps: Logps, has_reference: bool) -> PairLogprobs:
    policy_P2 = logps(model, batch)
    reference_P2 = batch.reference_P2 if has_reference else torch.zeros_like(policy_P2)
    assert reference_P2 is not None, "the reference's log-probabilities come with the batch"
    return PairLogprobs(*policy_P2.unbind(1), *reference_P2.unbind(1), *pair_tokens(batch).unbind(1))


def _loss(
    model: nn.Module,
    batch: PairBatch,
    *,
    pairs_of: Callable[[nn.Module, PairBatch], PairLogprobs],
    terms: Sequence[Term],
    rewards: Rewards,
) -> LossOut:
    pairs = pairs_of(model, batch)
    if batch.whole_PJ is not None:
        pairs = replace(pairs, mean_chosen_tokens=batch.whole_PJ[:, 0].to(pairs.chosen_P.dtype))
    loss_P = weighted_sum(pairs, terms)
    return LossOut(total=loss_P.sum(), count=len(loss_P), metrics=preference_metrics(pairs, *rewards(pairs)))


def _chosen_tokens(model: nn.Module, batch: PairBatch) -> Tensor:
    return pair_tokens(batch)[:, :1].double()


def _mean_chosen_tokens(tokens_A1: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return tokens_A1.mean(0, keepdim=True).expand_as(tokens_A1), state


def _loss_of_the_whole(
    model: nn.Module, batch: PairBatch, *, pairs_of: Callable[[nn.Module, PairBatch], PairLogprobs], rewards: Rewards
) -> LossOut:
    pairs = pairs_of(model, batch)
    assert batch.whole_PJ is not None
    loss_P, chosen_slope_P, rejected_slope_P = batch.whole_PJ.unbind(1)
    line_P = chosen_slope_P * pairs.chosen_P + rejected_slope_P * pairs.rejected_P
    total = line_P.sum() + (loss_P - line_P.detach()).sum()  # the loss's value, the line's gradient
    return LossOut(total=total, count=len(loss_P), metrics=preference_metrics(pairs, *rewards(pairs)))


def _columns(model: nn.Module, batch: PairBatch, *, pairs_of: Callable[[nn.Module, PairBatch], PairLogprobs]) -> Tensor:
    """[P, 6]: what a PairLogprobs holds."""
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


def _slopes(values_A6: Tensor, state: Tensor, *, terms: Sequence[Term], rewards: Rewards) -> tuple[Tensor, Tensor]:
    """[A, 3]: each pair's loss, and the slopes of all losses' sum towards its two log-probabilities.

    The state is a RunningMean of rewards, which bco_pair takes with this batch in it.
    """
    with torch.enable_grad():
        chosen_A, rejected_A, *others = values_A6.unbind(1)
        chosen_A, rejected_A = chosen_A.clone().requires_grad_(), rejected_A.clone().requires_grad_()
        pairs = PairLogprobs(chosen_A, rejected_A, *others)
        both_2A = torch.stack(rewards(pairs)).double()
        running = RunningMean(*state.unbind()).with_batch(both_2A.sum(), both_2A.numel())
        loss_A = weighted_sum(replace(pairs, reward_mean=running.mean), terms)
        slopes = torch.autograd.grad(loss_A.sum(), (chosen_A, rejected_A))
    return torch.stack([loss_A.detach(), *slopes], dim=1), torch.stack([running.mean, running.num_batches])  # type: ignore[list-item]

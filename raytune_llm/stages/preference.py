"""Learning from pairs of answers: DPO and its family with a reference, ORPO, SimPO and CPO without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from raytune_llm.config.stage import CPO, DPO, ORPO, SimPO
from raytune_llm.losses.preference import PairLogprobs, Term, mean_rewards, preference_metrics, rewards, weighted_sum
from raytune_llm.records import LossOut, PairBatch
from raytune_llm.stages.logprobs import answer_tokens, pair_logprobs
from raytune_llm.stages.objective import Objective

Rewards = Callable[[PairLogprobs], tuple[Tensor, Tensor]]


def dpo(section: DPO) -> Objective:
    weights = {section.loss: 1.0} if isinstance(section.loss, str) else section.loss
    given = {
        "beta": section.beta,
        "label_smoothing": section.label_smoothing,
        "tau": section.discopop_tau,
        "alpha": section.f_alpha,
    }
    terms = [Term(name, {key: given[key] for key in SETTINGS.get(name, ("beta",))}, weight) for name, weight in weights.items()]
    if section.sft_weight:
        terms.append(Term("chosen_nll", weight=section.sft_weight))
    has_reference = section.reference != "none"
    logps = partial(pair_logprobs, ld_alpha=section.ld_alpha)
    return Objective(
        loss=partial(_loss, logps=logps, terms=terms, rewards=partial(rewards, beta=section.beta), has_reference=has_reference),
        reference=logps if has_reference else None,
    )


SETTINGS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("beta", "label_smoothing"),
    "robust": ("beta", "label_smoothing"),
    "exo_pair": ("beta", "label_smoothing"),
    "aot": ("beta", "label_smoothing"),
    "aot_unpaired": ("beta", "label_smoothing"),
    "aot_pair": ("beta", "label_smoothing"),
    "discopop": ("beta", "tau"),
    "f_alpha": ("beta", "alpha"),
    "sft": (),
}
"""What DPO's losses take beside the pairs, where that is not beta alone."""


def orpo(section: ORPO) -> Objective:
    return _without_reference([Term("orpo", {"beta": section.beta})], partial(mean_rewards, beta=section.beta))


def simpo(section: SimPO) -> Objective:
    settings = {"beta": section.beta, "gamma": section.gamma, "label_smoothing": section.label_smoothing}
    return _without_reference([Term("simpo", settings)], partial(mean_rewards, beta=section.beta))


def cpo(section: CPO) -> Objective:
    settings = {"beta": section.beta, "label_smoothing": section.label_smoothing}
    return _without_reference([Term("cpo", settings)], partial(rewards, beta=section.beta))


def _without_reference(terms: Sequence[Term], rewards: Rewards) -> Objective:
    return Objective(loss=partial(_loss, logps=pair_logprobs, terms=terms, rewards=rewards, has_reference=False))


def _loss(
    model: nn.Module,
    batch: PairBatch,
    *,
    logps: Callable[[nn.Module, PairBatch], Tensor],
    terms: Sequence[Term],
    rewards: Rewards,
    has_reference: bool,
) -> LossOut:
    policy_P2 = logps(model, batch)
    reference_P2 = batch.reference_P2 if has_reference else torch.zeros_like(policy_P2)
    assert reference_P2 is not None, "the reference's log-probabilities come with the batch"
    pairs = PairLogprobs(*policy_P2.unbind(1), *reference_P2.unbind(1), *answer_tokens(batch).unbind(1))
    loss_P = weighted_sum(pairs, terms)
    return LossOut(total=loss_P.sum(), count=len(loss_P), metrics=preference_metrics(pairs, *rewards(pairs)))

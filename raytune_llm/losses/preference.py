"""Losses over pairs of answers to one prompt, the first preferred.

Each takes the pairs' log-probabilities and its own settings, and returns one loss per pair [P], unreduced. The loss of a step is
the mean over the pairs of the global batch. If a pair's loss depends on other pairs of the batch, the docstring says so.

Notation in the docstrings: C, R are the policy's log-probabilities of the chosen and the rejected answer in nats, summed over
their tokens; n_c, n_r the numbers of those tokens; c = C - C_ref and r = R - R_ref the log-ratios; d = c - r; b is beta,
e label_smoothing, s the logistic function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """The values of P pairs that losses use. Log-probabilities are sums over an answer's tokens (at least one), in nats. Without
    a reference, its log-probabilities are 0.

    For LD-DPO, the log-probabilities are the weighted sums of tokens.split_sums; token counts are not weighted.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    reference_chosen_P: Tensor
    reference_rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    mean_chosen_tokens: Tensor | float | None = None
    """The mean of chosen_tokens over the global batch, for `sft`; None: these pairs are the global batch."""
    reward_mean: Tensor | float = 0.0
    """The running mean of the rewards of all answers (RunningMean), including beta, for `bco_pair`."""

    @property
    def chosen_ratio_P(self) -> Tensor:
        """c"""
        return self.chosen_P - self.reference_chosen_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        """r"""
        return self.rejected_P - self.reference_rejected_P

    @property
    def margin_P(self) -> Tensor:
        """d"""
        return self.chosen_ratio_P - self.rejected_ratio_P

    @property
    def chosen_mean_P(self) -> Tensor:
        """C / n_c"""
        return self.chosen_P / self.chosen_tokens_P

    @property
    def rejected_mean_P(self) -> Tensor:
        """R / n_r"""
        return self.rejected_P / self.rejected_tokens_P


def dpo_sigmoid(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(b d) - e log s(-b d): the negative log-likelihood that the chosen answer wins (Rafailov et al. 2023, arXiv
    2305.18290, eq. 7).

    e > 0 is cDPO, which assumes that a label is wrong with probability e (Mitchell 2023).
    """
    return _logistic(beta * pairs.margin_P, label_smoothing)


def dpo_robust(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """[-(1 - e) log s(b d) + e log s(-b d)] / (1 - 2 e), e < 1/2: unbiased under labels flipped with probability e
    (Chowdhury et al. 2024, arXiv 2403.00409). Can be negative.
    """
    logits_P = beta * pairs.margin_P
    won_P, lost_P = F.logsigmoid(logits_P), F.logsigmoid(-logits_P)
    return (label_smoothing * lost_P - (1 - label_smoothing) * won_P) / (1 - 2 * label_smoothing)


def dpo_hinge(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """max(0, 1 - b d) (SLiC: Zhao et al. 2023, arXiv 2305.10425; on log-ratios: Liu et al. 2023, arXiv 2309.06657)."""
    return F.relu(1 - beta * pairs.margin_P)


def dpo_ipo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(c / n_c - r / n_r - 1 / (2 b))^2: identity preference optimisation on log-ratios per token (Azar et al. 2023, arXiv
    2310.12036)."""
    chosen_P, rejected_P = _ratios_per_token(pairs)
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def dpo_ipo_sum(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(d - 1 / (2 b))^2: identity preference optimisation on whole answers, as in the paper (arXiv 2310.12036)."""
    return (pairs.margin_P - 1 / (2 * beta)).square()


def dpo_exo_pair(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """KL([s(b d), s(-b d)] || [1 - e, e]), e > 0: reverse KL to the labels (Ji et al. 2024, arXiv 2402.00856)."""
    logits_P = beta * pairs.margin_P
    won_P, lost_P = F.logsigmoid(logits_P), F.logsigmoid(-logits_P)
    return won_P.exp() * (won_P - math.log1p(-label_smoothing)) + lost_P.exp() * (lost_P - math.log(label_smoothing))


def dpo_nca_pair(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log s(b c) - log s(-b c) / 2 - log s(-b r) / 2: noise contrastive alignment, which keeps the chosen answer's likelihood
    from falling (Chen et al. 2024, arXiv 2402.05369)."""
    chosen_P, rejected_P = rewards(pairs, beta=beta)
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


def dpo_sppo_hard(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(c - 1 / (2 b))^2 + (r + 1 / (2 b))^2: self-play with win rates of 1 and 0 (Wu et al. 2024, arXiv 2405.00675)."""
    return (pairs.chosen_ratio_P - 1 / (2 * beta)).square() + (pairs.rejected_ratio_P + 1 / (2 * beta)).square()


def dpo_aot(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO on sort(C - R) - sort(C_ref - R_ref): the policy's margins dominate the reference's in distribution
    (Melnyk et al. 2024, arXiv 2406.05882, the paired form).

    It sorts the batch: value i is the loss of the i-th smallest margins, not of pair i, and depends on all pairs of the batch.
    """
    margins_P = _sorted(pairs.chosen_P - pairs.rejected_P) - _sorted(pairs.reference_chosen_P - pairs.reference_rejected_P)
    return _logistic(beta * margins_P, label_smoothing)


def dpo_aot_unpaired(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO on sort(c) - sort(r): the chosen ratios dominate the rejected ones in distribution (arXiv 2406.05882).

    It sorts the batch, as dpo_aot does.
    """
    return _logistic(beta * (_sorted(pairs.chosen_ratio_P) - _sorted(pairs.rejected_ratio_P)), label_smoothing)


def dpo_apo_zero(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """1 - s(b c) + s(b r): raises the likelihood of the chosen answer and lowers that of the rejected one (D'Oosterlinck et al.
    2024, arXiv 2408.06266)."""
    chosen_P, rejected_P = rewards(pairs, beta=beta)
    return torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)


def dpo_apo_down(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """s(b c) + 1 - s(b d): lowers the likelihood of both answers, of the rejected one more; for chosen answers that are worse
    than the policy's own (arXiv 2408.06266)."""
    return torch.sigmoid(beta * pairs.chosen_ratio_P) + torch.sigmoid(-beta * pairs.margin_P)


def dpo_discopop(pairs: PairLogprobs, *, beta: float, tau: float = 0.05) -> Tensor:
    """(1 - m) (-log s(x)) + m exp(-x), x = b d, m = s(x / tau): log-ratio modulated (Lu et al. 2024, arXiv 2406.08414)."""
    logits_P = beta * pairs.margin_P
    # a single exponential, since m is 0 where exp(-x) overflows
    modulated_P = torch.exp(F.logsigmoid(logits_P / tau) - logits_P)
    return torch.sigmoid(-logits_P / tau) * -F.logsigmoid(logits_P) + modulated_P


def dpo_bco_pair(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log s(b c - D) - log s(-(b r - D)), D = pairs.reward_mean: each answer against the mean reward, as a binary classifier
    (Jung et al. 2024, arXiv 2404.04656).

    D is the running mean including this batch's rewards, so a loss depends on all pairs of the batch. D has no gradient.
    """
    chosen_P, rejected_P = rewards(pairs, beta=beta)
    return -F.logsigmoid(chosen_P - pairs.reward_mean) - F.logsigmoid(pairs.reward_mean - rejected_P)


def dpo_sigmoid_norm(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log s(b (c / n_c - r / n_r)): DPO on log-ratios per token (Lambert et al. 2024, arXiv 2411.15124)."""
    chosen_P, rejected_P = _ratios_per_token(pairs)
    return -F.logsigmoid(beta * (chosen_P - rejected_P))


def dpo_f_forward_kl(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """DPO with the scores f(x) = 1 - exp(-x) of c and r: forward KL in place of reverse (Wang et al. 2023, arXiv 2309.16240)."""
    return _f_dpo(pairs, lambda ratio_P: -_expm1(-ratio_P), beta)


def dpo_f_js(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """DPO with the scores log 2 + log s(x): Jensen-Shannon (arXiv 2309.16240). The constant cancels in the margin."""
    return _f_dpo(pairs, F.logsigmoid, beta)


def dpo_f_alpha(pairs: PairLogprobs, *, beta: float, alpha: float) -> Tensor:
    """DPO with the scores (exp((a - 1) x) - 1) / (a - 1), a != 1: alpha divergence (arXiv 2309.16240); `sigmoid` at the limit."""
    return _f_dpo(pairs, lambda ratio_P: _expm1((alpha - 1) * ratio_P) / (alpha - 1), beta)


def sft(pairs: PairLogprobs) -> Tensor:
    """Cross-entropy of the chosen answers: the mean over pairs is -sum(C) / sum(n_c), a mean over all tokens of the batch.

    It depends on all pairs of the batch, through the mean number of tokens. With pairs.mean_chosen_tokens of the global batch,
    losses of its parts add up.
    """
    if pairs.mean_chosen_tokens is None:
        num_tokens = pairs.chosen_tokens_P.sum()
    else:
        num_tokens = pairs.mean_chosen_tokens * len(pairs.chosen_P)
    return -(pairs.chosen_P.sum() / num_tokens).expand_as(pairs.chosen_P)


def chosen_nll(pairs: PairLogprobs) -> Tensor:
    """-C / n_c: cross-entropy of the chosen answer, as a mean over its tokens (sft_weight of DPO, L_SFT of ORPO)."""
    return -pairs.chosen_mean_P


def odds_ratio(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-b log s(L), L the log odds ratio: ORPO without its cross-entropy."""
    return -beta * F.logsigmoid(log_odds_ratio(pairs))


def orpo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-C / n_c - b log s(L): cross-entropy and odds ratio, no reference (Hong et al. 2024, arXiv 2403.07691)."""
    return chosen_nll(pairs) + odds_ratio(pairs, beta=beta)


def simpo(pairs: PairLogprobs, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(b (C / n_c - R / n_r) - gamma): no reference (Meng et al. 2024, arXiv 2405.14734).

    gamma is the target margin in units of the reward (not gamma / beta). label_smoothing is as in dpo_sigmoid.
    """
    return _logistic(beta * (pairs.chosen_mean_P - pairs.rejected_mean_P) - gamma, label_smoothing)


def cpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(b (C - R)): no reference (Xu et al. 2024, arXiv 2401.08417). Its behaviour-cloning term is `sft`."""
    return _logistic(beta * (pairs.chosen_P - pairs.rejected_P), label_smoothing)


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": dpo_sigmoid,
    "robust": dpo_robust,
    "hinge": dpo_hinge,
    "ipo": dpo_ipo,
    "ipo_sum": dpo_ipo_sum,
    "exo_pair": dpo_exo_pair,
    "nca_pair": dpo_nca_pair,
    "sppo_hard": dpo_sppo_hard,
    "aot": dpo_aot,
    "aot_unpaired": dpo_aot_unpaired,
    "aot_pair": dpo_aot_unpaired,  # the name that TRL gave it
    "apo_zero": dpo_apo_zero,
    "apo_down": dpo_apo_down,
    "discopop": dpo_discopop,
    "bco_pair": dpo_bco_pair,
    "sigmoid_norm": dpo_sigmoid_norm,
    "f_forward_kl": dpo_f_forward_kl,
    "f_js": dpo_f_js,
    "f_alpha": dpo_f_alpha,
    "sft": sft,
    "chosen_nll": chosen_nll,
    "odds_ratio": odds_ratio,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
}


@dataclass(frozen=True, slots=True)
class Term:
    """A term of a weighted sum of losses: a name in PREFERENCE_LOSSES, its weight, and the function's other arguments."""

    loss: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


def weighted_sum(pairs: PairLogprobs, terms: Sequence[Term]) -> Tensor:
    """Sum of weight * loss [P].

    MPO (Wang et al. 2024, arXiv 2411.10442) is 0.8 sigmoid + 0.2 bco_pair + 1.0 sft; DPO with `ftx` is sigmoid + ftx chosen_nll;
    CPO and SimPO with cross-entropy add `sft`; DPO with a BCO weight w is (sigmoid + w bco_pair) / (1 + w).
    """
    return torch.stack([term.weight * PREFERENCE_LOSSES[term.loss](pairs, **term.settings) for term in terms]).sum(0)


@dataclass(frozen=True, slots=True)
class RunningMean:
    """The mean over batches of their mean reward (BCO's shift D). It is saved in checkpoints."""

    mean: Tensor | float = 0.0
    num_batches: Tensor | int = 0

    def with_batch(self, reward_total: Tensor, reward_count: Tensor | int) -> RunningMean:
        """The mean after one more global batch. reward_total, reward_count: the sum and number of the rewards of all its answers,
        chosen and rejected."""
        step = (reward_total.detach() / reward_count - self.mean) / (self.num_batches + 1)
        return RunningMean(self.mean + step, self.num_batches + 1)


def rewards(pairs: PairLogprobs, *, beta: float) -> tuple[Tensor, Tensor]:
    """b c and b r [P]: the rewards that a DPO policy implies (arXiv 2305.18290, eq. 5), up to a term that depends on the
    prompt."""
    return beta * pairs.chosen_ratio_P, beta * pairs.rejected_ratio_P


def mean_rewards(pairs: PairLogprobs, *, beta: float) -> tuple[Tensor, Tensor]:
    """b C / n_c and b R / n_r [P]: the rewards of ORPO and SimPO."""
    return beta * pairs.chosen_mean_P, beta * pairs.rejected_mean_P


def log_odds_ratio(pairs: PairLogprobs) -> Tensor:
    """L = log odds(exp(C / n_c)) - log odds(exp(R / n_r)) [P], odds(p) = p / (1 - p)."""
    return _log_odds(pairs.chosen_mean_P) - _log_odds(pairs.rejected_mean_P)


def preference_metrics(
    pairs: PairLogprobs, chosen_rewards_P: Tensor, rejected_rewards_P: Tensor
) -> dict[str, tuple[Tensor, int]]:
    """Sums and counts of TRL's metrics for pairs, for the rewards that the loss uses, without gradient. A tie counts as wrong."""
    chosen_P, rejected_P, count = chosen_rewards_P.detach(), rejected_rewards_P.detach(), len(pairs.chosen_P)
    return {
        "rewards/chosen": (chosen_P.sum(), count),
        "rewards/rejected": (rejected_P.sum(), count),
        "rewards/margins": ((chosen_P - rejected_P).sum(), count),
        "rewards/accuracies": ((chosen_P > rejected_P).to(chosen_P.dtype).sum(), count),
        "logps/chosen": (pairs.chosen_P.detach().sum(), count),
        "logps/rejected": (pairs.rejected_P.detach().sum(), count),
    }


def _logistic(logits_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)


def _f_dpo(pairs: PairLogprobs, score: Callable[[Tensor], Tensor], beta: float) -> Tensor:
    return _logistic(beta * (score(pairs.chosen_ratio_P) - score(pairs.rejected_ratio_P)))


def _ratios_per_token(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    return pairs.chosen_ratio_P / pairs.chosen_tokens_P, pairs.rejected_ratio_P / pairs.rejected_tokens_P


def _expm1(exponent_P: Tensor) -> Tensor:
    """expm1 with a clamped exponent: infinity has no gradient, and the difference of two infinities is NaN."""
    return torch.expm1(exponent_P.clamp(max=math.log(torch.finfo(exponent_P.dtype).max) - 10))


def _sorted(values_P: Tensor) -> Tensor:
    return values_P.sort(stable=True).values  # equal values get their gradients in the pairs' order, on every device


def _log_odds(logprob_P: Tensor) -> Tensor:
    # clamped one rounding step below 0, since a probability of 1 has infinite odds and no finite gradient
    logprob_P = logprob_P.clamp(max=-torch.finfo(logprob_P.dtype).eps)
    return logprob_P - torch.log(-torch.expm1(logprob_P))

"""Pair losses against published formulas in float64: values, gradients by the policy's tokens, rewards, metrics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raytune_llm.losses.preference import (
    PairLogprobs,
    RunningMean,
    Term,
    log_odds_ratio,
    mean_rewards,
    preference_metrics,
    rewards,
    weighted_sum,
)
from raytune_llm.losses.tokens import split_sums
from tests.parity.sets import oracle

ORACLE = oracle("preference")
RUNNING = [case for case in ORACLE["cases"] if case["kind"] == "bco_running"]
SINGLE = [case for case in ORACLE["cases"] if case["kind"] != "bco_running"]

TOKENS = ("policy_chosen_tok", "policy_rejected_tok", "ref_chosen_tok", "ref_rejected_tok")
LOSS_SETTINGS = ("beta", "label_smoothing", "gamma", "tau", "alpha")


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=1e-9, atol=1e-9)


def token_logprobs(inputs):
    """Padded token log-probabilities by name; the policy's ask for a gradient."""
    return {name: torch.tensor(inputs[name], dtype=torch.float64, requires_grad=name.startswith("policy")) for name in TOKENS}


def pair_logprobs(inputs, tokens, params):
    lengths = {side: torch.tensor(inputs[f"{side}_len"]) for side in ("chosen", "rejected")}
    shared = torch.minimum(lengths["chosen"], lengths["rejected"])

    def sums(name):
        side = "chosen" if "chosen" in name else "rejected"
        is_token = torch.arange(tokens[name].shape[1]) < lengths[side][:, None]
        head, tail = split_sums(tokens[name][is_token], is_token.nonzero()[:, 0], shared)
        desensitised = name.startswith("policy") or params.get("ld_on_ref", True)
        return head + (params.get("ld_alpha", 1.0) if desensitised else 1.0) * tail

    pairs = PairLogprobs(
        chosen_P=sums("policy_chosen_tok"),
        rejected_P=sums("policy_rejected_tok"),
        reference_chosen_P=sums("ref_chosen_tok"),
        reference_rejected_P=sums("ref_rejected_tok"),
        chosen_tokens_P=lengths["chosen"],
        rejected_tokens_P=lengths["rejected"],
        reward_mean=params.get("delta", 0.0),
    )
    return without_reference(pairs) if params.get("reference_free") else pairs


def without_reference(pairs):
    zeros = torch.zeros_like(pairs.reference_chosen_P)
    return replace(pairs, reference_chosen_P=zeros, reference_rejected_P=zeros)


def terms(kind, params):
    """A case's loss as a weighted sum of ours."""
    settings = {name: params[name] for name in LOSS_SETTINGS if name in params}
    match kind:
        case "combined":
            return [
                Term(loss, {} if loss == "sft" else settings, weight)
                for loss, weight in zip(params["types"], params["weights"], strict=True)
            ]
        case "dpo_ftx":
            return [Term("sigmoid", settings), Term("chosen_nll", weight=params["ftx"])]
        case "dpo_bco":
            w = params["bco_weight"]
            return [Term("sigmoid", settings, 1 / (1 + w)), Term("bco_pair", settings, w / (1 + w))]
        case "simpo_nll" | "cpo_nll":
            return [Term(kind.removesuffix("_nll"), settings), Term("sft", weight=params["cpo_alpha"])]
        case "orpo_or":
            return [Term("odds_ratio", settings)]
        case _:
            return [Term(kind, settings)]


def pair_rewards(kind, pairs, beta):
    """By the stage that a kind belongs to: ORPO and SimPO have rewards a token, CPO has no reference."""
    if kind.startswith(("orpo", "simpo")):
        return mean_rewards(pairs, beta=beta)
    return rewards(without_reference(pairs) if kind.startswith("cpo") else pairs, beta=beta)


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case["id"])
def test_pair_loss_its_gradient_and_metrics_are_the_formulas(case):
    inputs, params, expected = ORACLE["inputs"][case["input"]], case["params"], case["expected"]
    tokens = token_logprobs(inputs)
    pairs = pair_logprobs(inputs, tokens, params)

    losses = weighted_sum(pairs, terms(case["kind"], params))
    losses.mean().backward()

    close(losses, expected["losses"])
    close(losses.mean(), expected["loss"])
    for side in ("chosen", "rejected"):
        grad = tokens[f"policy_{side}_tok"].grad
        close(torch.zeros_like(tokens[f"policy_{side}_tok"]) if grad is None else grad, expected[f"grad_policy_{side}_tok"])
    chosen, rejected = pair_rewards(case["kind"], pairs, params.get("beta", 0.1))
    close(chosen, expected["rewards_chosen"])
    close(rejected, expected["rewards_rejected"])
    metrics = {name: (total / count).item() for name, (total, count) in preference_metrics(pairs, chosen, rejected).items()}
    assert metrics == pytest.approx(expected["metrics"], rel=1e-9, abs=1e-9)
    if "log_odds" in expected:
        close(log_odds_ratio(pairs), expected["log_odds"])


@pytest.mark.parametrize("case", RUNNING, ids=lambda case: case["id"])
def test_bco_shifts_rewards_by_their_running_mean(case):
    params, expected, running = case["params"], case["expected"], RunningMean()
    for step, key in enumerate(case["input"]):
        inputs = ORACLE["inputs"][key]
        pairs = pair_logprobs(inputs, token_logprobs(inputs), params)
        both = torch.cat(rewards(pairs, beta=params["beta"]))
        running = running.with_batch(both.sum(), both.numel())
        pairs = pair_logprobs(inputs, token_logprobs(inputs), params | {"delta": running.mean})

        losses = weighted_sum(pairs, [Term("bco_pair", {"beta": params["beta"]})])

        assert float(running.mean) == pytest.approx(expected["delta"][step], rel=1e-9, abs=1e-9)
        close(losses, expected["losses"][step])
        close(losses.mean(), expected["loss"][step])

"""What the head says is the same in chunks and at once, forward and backward."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.losses.tokens import asft, cross_entropy, token_correct, token_entropy, token_logprobs
from raytune_llm.models.head import TokenFunction, adjusted, together, token_values

N, D, V = 13, 8, 29


def of_one_and_other(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return token_logprobs(logits_NV, targets_N), token_entropy(logits_NV)


def with_a_metric(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return token_entropy(logits_NV).detach(), cross_entropy(logits_NV, targets_N), token_correct(logits_NV, targets_N).double()


@pytest.mark.parametrize(
    "function",
    [cross_entropy, of_one_and_other, with_a_metric, adjusted(cross_entropy, 0.5, 3.0), adjusted(with_a_metric, 0.5, 3.0)],
)
@pytest.mark.parametrize("trained_head", [True, False])
def test_values_and_gradients_are_those_of_all_logits_at_once(function: TokenFunction, trained_head: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=trained_head)
    targets = torch.randint(V, (N,))
    inputs = [hidden, weight] if trained_head else [hidden]

    plain = together(function(hidden @ weight.T, targets))
    upstream = torch.randn_like(plain)
    ours = token_values(hidden, weight, targets, function, compute=torch.float64, chunk_tokens=5)

    torch.testing.assert_close(ours, plain)
    for got, wanted in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_no_gradient_is_prepared_where_none_is_asked_for() -> None:
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))
    with torch.no_grad():
        values = token_values(hidden, weight, targets, cross_entropy, compute=torch.float32, chunk_tokens=5)
    torch.testing.assert_close(values, cross_entropy(hidden @ weight.T, targets))


@pytest.mark.parametrize("trained_head", [True, False])
def test_a_function_of_other_hidden_states_takes_their_logits_as_constants(trained_head: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    other = torch.randn(N, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=trained_head)
    targets = torch.randint(V, (N,))
    inputs = [hidden, weight] if trained_head else [hidden]

    def anchored(logits_NV: torch.Tensor, targets_N: torch.Tensor, reference_NV: torch.Tensor) -> torch.Tensor:
        return asft(logits_NV, targets_N, reference_logits_NV=reference_NV, alpha=0.3)

    plain = adjusted(anchored, 0.5, 3.0)(hidden @ weight.T, targets, other @ weight.detach().T)
    ours = token_values(
        hidden, weight, targets, adjusted(anchored, 0.5, 3.0), compute=torch.float64, chunk_tokens=5, other_ND=other
    )
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(plain)
    for got, wanted in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted)

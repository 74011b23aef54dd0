"""Steps of optimizers against values computed in float64 from the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytune_llm.train.optimizers.adamw import adamw
from raytune_llm.train.optimizers.apollo import Apollo
from raytune_llm.train.optimizers.galore import galore
from raytune_llm.train.optimizers.groups import Trained
from raytune_llm.train.optimizers.low_rank import low_rank_groups
from raytune_llm.train.optimizers.muon import muon, orthogonalized
from raytune_llm.train.strategies.clipped_step import LossScale, clipped_step
from tests.parity.sets import oracle


def test_every_kind_of_case_is_compared_here_or_with_the_schedules() -> None:
    kinds = {"adamw", "muon", "newton_schulz", "galore", "apollo", "grad_clip", "schedule"}
    assert {case["kind"] for case in oracle("optim")["cases"]} == kinds


def cases(kind: str) -> list[Any]:
    read = oracle("optim")
    return [pytest.param(case, read["inputs"][case["input"]], id=case["id"]) for case in read["cases"] if case["kind"] == kind]


def weight_of(inputs: dict[str, Any]) -> Trained:
    return Trained("matrix", nn.Parameter(torch.tensor(inputs["weight"], dtype=torch.float64)), layer=0)


def weights_after(optimizer: torch.optim.Optimizer, weight: nn.Parameter, inputs: dict[str, Any], lr: float) -> list[Tensor]:
    after = []
    for gradient in inputs["grads"]:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        clipped_step(optimizer, [weight], lr, None, LossScale(torch.device("cpu"), enabled=False))
        after.append(weight.detach().clone())
    return after


@pytest.mark.parametrize(("case", "inputs"), cases("adamw"))
def test_adamw_has_the_reference_weights(case: dict[str, Any], inputs: dict[str, Any]) -> None:
    weight, params = weight_of(inputs), case["params"]
    optimizer = adamw([weight], **params, fused=True)
    after = weights_after(optimizer, weight.parameter, inputs, params["lr"])
    torch.testing.assert_close(torch.stack(after), torch.tensor(case["expected"]["weight_after"], dtype=torch.float64))


@pytest.mark.parametrize(("case", "inputs"), cases("muon"))
def test_muon_has_the_reference_weights_as_near_as_bf16_comes(case: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Its orthogonalization is in bf16: each step to a twentieth of its size."""
    weight, params = weight_of(inputs), case["params"]
    rest = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "adamw_lr_factor": 1.0, "adamw_moments": "float32"}
    kept = {name: params[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
    before = weight.parameter.detach().clone()
    after = weights_after(muon([weight], **kept, **rest, fused=True), weight.parameter, inputs, params["lr"])
    expected = torch.tensor(case["expected"]["weight_after"], dtype=torch.float64)
    bound = 0.05 * params["lr"] * 0.2 * math.sqrt(max(before.shape))
    assert (expected[0] - before).abs().max() > 3 * bound
    for step, (ours, theirs) in enumerate(zip(after[: len(expected)], expected, strict=True)):
        assert (ours - theirs).abs().max() < (step + 1) * bound


@pytest.mark.parametrize(("case", "inputs"), cases("newton_schulz"))
def test_singular_values_come_near_1_as_the_reference_ones_do(case: dict[str, Any], inputs: dict[str, Any]) -> None:
    gradient, expected = torch.tensor(inputs["grads"][0]), case["expected"]
    for given, name in ((gradient, "out"), (gradient.T, "out_transposed_input")):
        reference = torch.tensor(expected[name])
        assert (orthogonalized(given[None])[0] - reference).abs().max() < 0.05 < reference.abs().max() / 3


@pytest.mark.parametrize(("case", "inputs"), cases("galore"))
def test_galore_has_the_reference_weights(case: dict[str, Any], inputs: dict[str, Any]) -> None:
    weight, params = weight_of(inputs), case["params"]
    kept = {name: params[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "rank", "scale")}
    optimizer = galore([weight], **kept, update_every=params["update_proj_gap"], fused=True)
    after = weights_after(optimizer, weight.parameter, inputs, params["lr"])
    expected = torch.tensor(case["expected"]["weight_after"], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(after[: len(expected)]), expected, rtol=1e-9, atol=1e-12)


class Projected(Apollo):
    """By a projection that is given."""

    given: Tensor

    def projection(self, gradient: Tensor, rank: int, seed: int) -> Tensor:
        return self.given


@pytest.mark.parametrize(("case", "inputs"), cases("apollo"))
def test_apollo_has_the_reference_weights(case: dict[str, Any], inputs: dict[str, Any]) -> None:
    weight, params = weight_of(inputs), case["params"]
    projected = {name: params[name] for name in ("rank", "scale")} | {"sizes": params["scale_type"], "update_every": 200}
    groups = low_rank_groups([weight], params["weight_decay"], **projected)
    optimizer = Projected(groups, {"lr": params["lr"], "betas": (params["beta1"], params["beta2"]), "eps": params["eps"]})
    optimizer.given = torch.tensor(params["projection"], dtype=torch.float64)
    after = weights_after(optimizer, weight.parameter, inputs, params["lr"])
    expected = torch.tensor(case["expected"]["weight_after"], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(after[: len(expected)]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("case", "inputs"), cases("grad_clip"))
def test_gradients_are_clipped_by_the_reference_scale(case: dict[str, Any], inputs: dict[str, Any]) -> None:
    gradients = [torch.tensor(gradient, dtype=torch.float64) for gradient in inputs["grads"]]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    out = clipped_step(optimizer, parameters, 1.0, case["params"]["max_norm"], LossScale(torch.device("cpu"), enabled=False))
    assert math.isclose(float(out.grad_norm), case["expected"]["total_norm"], rel_tol=1e-9)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), -gradient * case["expected"]["scale"], rtol=1e-6, atol=0)

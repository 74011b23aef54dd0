"""A step clips, unscales and skips, whatever the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raytune_llm.train.optimizers.adamw import adamw
from raytune_llm.train.optimizers.groups import Trained
from raytune_llm.train.optimizers.muon import muon
from raytune_llm.train.optimizers.sgd import sgd
from raytune_llm.train.strategies.own_optimizer import LossScale, clipped_step

CPU = torch.device("cpu")
ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
Build = Callable[[list[Trained]], torch.optim.Optimizer]


class SignDescent(torch.optim.Optimizer):
    """Knows nothing of scales."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure=None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= self.param_groups[0]["lr"] * (parameter.grad.sign() + parameter.grad)


BUILD: dict[str, Build] = {
    "adamw": lambda trained: adamw(trained, lr=0.1, **ADAM, weight_decay=0.1, fused=True),
    "muon": lambda trained: muon(
        trained, lr=0.1, momentum=0.95, nesterov=True, weight_decay=0.1, **ADAM, adamw_lr_factor=0.5, fused=True
    ),
    "sgd": lambda trained: sgd(trained, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.1, fused=True),
    "one that knows nothing of scales": lambda trained: SignDescent([one.parameter for one in trained]),
}


def trained() -> list[Trained]:
    torch.manual_seed(0)
    shapes = {"layer.matrix": (8, 6), "layer.vector": (6,), "embedding": (5, 4)}
    return [Trained(name, nn.Parameter(torch.randn(shape)), name == "layer.matrix") for name, shape in shapes.items()]


def gradients(step: int, size: float = 3.0) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [torch.randn(one.parameter.shape, generator=random) * size for one in trained()]


def step(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    grads: list[Tensor],
    max_grad_norm: float | None = None,
    scale: LossScale | None = None,
    lr: float = 0.1,
):
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return clipped_step(optimizer, parameters, lr, max_grad_norm, scale or LossScale(CPU, enabled=False))


def everything(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for parameter in parameters for _, value in sorted(optimizer.state[parameter].items())]
    return [tensor.detach().clone() for tensor in (*parameters, *state)]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", BUILD)
def test_a_gradient_that_is_not_finite_leaves_weights_and_state_to_the_bit(name: str, broken: float) -> None:
    ours, never = trained(), trained()
    parameters, others = ([one.parameter for one in each] for each in (ours, never))
    optimizer, undisturbed = BUILD[name](ours), BUILD[name](never)
    bad = gradients(7)
    bad[0][0, 0] = broken
    for number in range(3):
        if number != 1:
            before = everything(parameters, optimizer)
            assert step(optimizer, parameters, bad, 1.0).skipped
            assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=False))
        assert not step(optimizer, parameters, gradients(number), 1.0).skipped
        step(undisturbed, others, gradients(number), 1.0)
    left, right = everything(parameters, optimizer), everything(others, undisturbed)
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", BUILD)
def test_a_step_is_that_of_gradients_clipped_by_hand(name: str) -> None:
    """Several of them: the size of AdamW's first step and of Muon's does not depend on the gradient's."""
    ours, hand = trained(), trained()
    parameters, others = ([one.parameter for one in each] for each in (ours, hand))
    optimizer, other = BUILD[name](ours), BUILD[name](hand)
    for number, size in enumerate((3.0, 0.01, 30.0)):
        grads = gradients(number, size)
        norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads))
        out = step(optimizer, parameters, grads, 1.0)
        assert math.isclose(float(out.grad_norm), norm, rel_tol=1e-6)
        clipped = [grad * min(1.0, 1.0 / (norm + 1e-6)) for grad in grads]
        assert step(other, others, clipped).grad_norm <= 1.0
    unclipped = trained()
    free, optimizer = [one.parameter for one in unclipped], BUILD[name](unclipped)
    for number, size in enumerate((3.0, 0.01, 30.0)):
        step(optimizer, free, gradients(number, size))
    for mine, theirs, without in zip(parameters, others, free, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert (mine - without).abs().max() > 1e-3


def test_gradient_descent_moves_by_the_clipped_gradient() -> None:
    one = Trained("matrix", nn.Parameter(torch.zeros(2, 2)), True)
    optimizer = sgd([one], lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, fused=True)
    step(optimizer, [one.parameter], [torch.tensor([[3.0, 0.0], [0.0, 4.0]])], 2.0)
    torch.testing.assert_close(one.parameter.detach(), -0.1 * torch.tensor([[3.0, 0.0], [0.0, 4.0]]) * 2 / 5)


@pytest.mark.parametrize("name", BUILD)
def test_a_scaled_loss_is_unscaled(name: str) -> None:
    scale = LossScale(CPU, enabled=True)
    ours, other = trained(), trained()
    parameters, others = ([one.parameter for one in each] for each in (ours, other))
    optimizer, plain = BUILD[name](ours), BUILD[name](other)
    for number in range(2):
        out = step(optimizer, parameters, [grad * scale.scale for grad in gradients(number)], 1.0, scale)
        assert out.grad_norm == step(plain, others, gradients(number), 1.0).grad_norm
    for mine, theirs in zip(parameters, others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_group_has_a_factor_of_the_learning_rate() -> None:
    slow, fast = (Trained(name, nn.Parameter(torch.zeros(3, 3)), True) for name in ("a", "b"))
    optimizer = torch.optim.SGD([{"params": [slow.parameter]}, {"params": [fast.parameter], "lr_factor": 16.0}], lr=1.0)
    step(optimizer, [slow.parameter, fast.parameter], [torch.ones(3, 3)] * 2, lr=0.25)
    assert torch.equal(slow.parameter, torch.full((3, 3), -0.25))
    assert torch.equal(fast.parameter, torch.full((3, 3), -4.0))

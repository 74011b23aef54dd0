"""A step clips, unscales and skips, whatever the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytune_llm.config.load import load_config
from raytune_llm.train.optimizers import OPTIMIZERS, build_optimizer
from raytune_llm.train.optimizers.adafactor import adafactor
from raytune_llm.train.optimizers.adam_mini import adam_mini
from raytune_llm.train.optimizers.adamw import adamw
from raytune_llm.train.optimizers.adamw_8bit import SMALL, AdamW8bit, adamw_8bit
from raytune_llm.train.optimizers.adamw_bf16 import adamw_bf16
from raytune_llm.train.optimizers.apollo import apollo
from raytune_llm.train.optimizers.badam import badam
from raytune_llm.train.optimizers.galore import galore
from raytune_llm.train.optimizers.groups import Trained
from raytune_llm.train.optimizers.lion import lion
from raytune_llm.train.optimizers.muon import muon
from raytune_llm.train.optimizers.schedule_free import schedule_free
from raytune_llm.train.optimizers.sgd import sgd
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.clipped_step import LossScale, clipped_step
from raytune_llm.train.strategies.ddp import DDPStrategy
from raytune_llm.train.strategies.own_optimizer import load_optimizer_state, optimizer_state
from tests.models import tiny_llama

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
        trained,
        lr=0.1,
        momentum=0.95,
        nesterov=True,
        weight_decay=0.1,
        **ADAM,
        adamw_lr_factor=0.5,
        adamw_moments="float32",
        fused=True,
    ),
    "adafactor": lambda trained: adafactor(
        trained, lr=0.1, beta2_decay=0.8, eps=1e-30, clip_threshold=1.0, relative_to_weights=False, weight_decay=0.1, fused=True
    ),
    "adafactor relative to weights": lambda trained: adafactor(
        trained, lr=0.1, beta2_decay=0.8, eps=1e-30, clip_threshold=1.0, relative_to_weights=True, weight_decay=0.1, fused=True
    ),
    "adam_mini": lambda trained: adam_mini(trained, lr=0.1, **ADAM, weight_decay=0.1, fused=True),
    "adamw_8bit": lambda trained: adamw_8bit(trained, lr=0.1, **ADAM, weight_decay=0.1, paged=False, fused=True),
    "adamw_bf16": lambda trained: adamw_bf16(trained, lr=0.1, **ADAM, weight_decay=0.1, fused=True),
    "apollo": lambda trained: apollo(
        trained, lr=0.1, **ADAM, weight_decay=0.1, rank=2, sizes="channel", update_every=2, scale=1.0, fused=True
    ),
    "apollo by tensor": lambda trained: apollo(
        trained, lr=0.1, **ADAM, weight_decay=0.1, rank=1, sizes="tensor", update_every=2, scale=1.0, fused=True
    ),
    "badam": lambda trained: badam(
        trained, lr=0.1, **ADAM, weight_decay=0.1, switch_every=2, order="ascending", outside_layers=True, fused=True
    ),
    "galore": lambda trained: galore(trained, lr=0.1, **ADAM, weight_decay=0.1, rank=2, update_every=2, scale=1.0, fused=True),
    "lion": lambda trained: lion(trained, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, fused=True),
    "schedule_free": lambda trained: schedule_free(trained, lr=0.1, **ADAM, weight_decay=0.1, fused=True),
    "sgd": lambda trained: sgd(trained, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.1, fused=True),
    "sgd without momentum": lambda trained: sgd(trained, lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.1, fused=True),
    "one that knows nothing of scales": lambda trained: SignDescent([one.parameter for one in trained]),
}


def trained() -> list[Trained]:
    torch.manual_seed(0)
    shapes = {"layer.matrix": (8, 6), "layer.vector": (6,), "embedding": (5, 4)}
    return [
        Trained(name, nn.Parameter(torch.randn(shape)), 0 if name == "layer.matrix" else None) for name, shape in shapes.items()
    ]


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


def test_every_optimizer_is_here() -> None:
    assert {name.partition(" ")[0] for name in BUILD} - {"one"} == OPTIMIZERS.keys()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", BUILD)
def test_a_gradient_that_is_not_finite_leaves_weights_and_state_to_the_bit(name: str, broken: float) -> None:
    ours, never = trained(), trained()
    parameters, others = ([one.parameter for one in each] for each in (ours, never))
    optimizer, undisturbed = BUILD[name](ours), BUILD[name](never)
    bad = gradients(7)
    for gradient in bad:
        gradient.view(-1)[0] = broken
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


@pytest.mark.parametrize("name", [name for name in BUILD if name != "badam"])
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


def test_badam_is_clipped_by_the_norm_of_the_block_in_turn() -> None:
    ours, hand, free = trained(), trained(), trained()
    optimizers = [BUILD["badam"](each) for each in (ours, hand, free)]
    weights = [[one.parameter for one in each] for each in (ours, hand, free)]
    for number, size in enumerate((3.0, 0.01)):
        grads = gradients(number, size)
        norm = float(grads[0].norm())
        assert float(step(optimizers[0], weights[0], grads, 1.0).grad_norm) == pytest.approx(norm)
        step(optimizers[1], weights[1], [grad * min(1.0, 1.0 / norm) for grad in grads])
        step(optimizers[2], weights[2], grads)
    torch.testing.assert_close(weights[0][0], weights[1][0], rtol=1e-4, atol=1e-4)
    assert (weights[0][0] - weights[2][0]).abs().max() > 1e-3


def test_gradient_descent_moves_by_the_clipped_gradient() -> None:
    one = Trained("matrix", nn.Parameter(torch.zeros(2, 2)), 0)
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
    slow, fast = (Trained(name, nn.Parameter(torch.zeros(3, 3)), 0) for name in ("a", "b"))
    optimizer = torch.optim.SGD([{"params": [slow.parameter]}, {"params": [fast.parameter], "lr_factor": 16.0}], lr=1.0)
    step(optimizer, [slow.parameter, fast.parameter], [torch.ones(3, 3)] * 2, lr=0.25)
    assert torch.equal(slow.parameter, torch.full((3, 3), -0.25))
    assert torch.equal(fast.parameter, torch.full((3, 3), -4.0))


class Pages:
    """The part of bitsandbytes.functional that makes paged memory, which only a GPU's driver has."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def get_paged(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        page = torch.empty(shape, dtype=dtype)
        self.made.append(page.data_ptr())
        return page


def test_state_that_is_read_from_a_checkpoint_is_in_pages_again() -> None:
    parameter, pages = nn.Parameter(torch.zeros(SMALL)), Pages()
    optimizer = AdamW8bit([{"params": [parameter]}], {"lr": 0.1}, functional=pages, paged=True)
    layout = optimizer.layout((SMALL,), torch.float32, {})
    kept = {f"optimizer.w.{name}": torch.ones(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
    load_optimizer_state([("w", parameter)], optimizer, kept, lambda state: [state[name].fill_(1) for name in kept])
    state = optimizer_state([("w", parameter)], optimizer)
    codes = [state[f"optimizer.w.{name}"] for name in ("exp_avg", "exp_avg_sq")]
    assert [value.data_ptr() for value in codes] == pages.made and all((value == 1).all() for value in codes)
    assert state["optimizer.w.step"].is_cpu and state["optimizer.w.exp_avg_max"].shape == (SMALL // 256,)


def test_a_pattern_of_a_group_finds_the_names_that_the_run_was_checked_by() -> None:
    """Of the model, without what a policy puts before them."""
    pattern = r"optimizer.groups={'\Amodel[.]layers[.]0[.]': {lr_factor: 0.5}}"
    build: Any = partial(build_optimizer, load_config("train", ["data.path=x", pattern]).optimizer)
    policy = tiny_llama().requires_grad_(True)
    strategy = DDPStrategy(policy, build, Training(CPU, torch.float32, max_grad_norm=None))
    found = [one for group in strategy.optimizer.param_groups if group["lr_factor"] == 0.5 for one in group["params"]]
    assert set(found) == set(policy.get_submodule("model.model.layers.0").parameters())

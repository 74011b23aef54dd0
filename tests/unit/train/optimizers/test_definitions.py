"""Steps of optimizers against libraries that have them, or against their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TheirAdafactor

from raytune_llm.train.optimizers.adafactor import adafactor
from raytune_llm.train.optimizers.adam_mini import adam_mini
from raytune_llm.train.optimizers.adamw_8bit import adamw_8bit
from raytune_llm.train.optimizers.adamw_bf16 import adamw_bf16, rounded_by_chance
from raytune_llm.train.optimizers.apollo import Apollo, apollo
from raytune_llm.train.optimizers.badam import badam
from raytune_llm.train.optimizers.galore import galore
from raytune_llm.train.optimizers.groups import Trained
from raytune_llm.train.optimizers.lion import lion
from raytune_llm.train.optimizers.muon import muon
from raytune_llm.train.optimizers.schedule_free import schedule_free

STEPS = 6
ADAM: dict[str, Any] = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "fused": True}
LIBRARY: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(STEPS)]


def stepped(make: Callable[[nn.Parameter], torch.optim.Optimizer], shape: tuple[int, ...]) -> Tensor:
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    optimizer = make(parameter)
    for gradient in gradients(shape):
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("shape", [(16, 12), (3, 8, 12), (12,)])
def test_adafactor_is_that_of_transformers(shape: tuple[int, ...], relative: bool) -> None:
    settings = {"lr": 0.01, "beta2_decay": 0.8, "eps": 1e-30, "clip_threshold": 1.0, "weight_decay": 0.0, "fused": True}
    ours = stepped(lambda p: adafactor([Trained("w", p, 0)], relative_to_weights=relative, **settings), shape)
    theirs = stepped(lambda p: TheirAdafactor([p], lr=0.01, scale_parameter=relative, relative_step=False), shape)
    torch.testing.assert_close(ours, theirs)


def test_lion_is_that_of_bitsandbytes() -> None:
    settings = {name: ADAM[name] for name in ("lr", "beta1", "beta2", "weight_decay", "fused")}
    ours = stepped(lambda p: lion([Trained("w", p, 0)], **settings), (16, 12))
    assert torch.equal(ours, stepped(lambda p: bitsandbytes.optim.Lion([p], **LIBRARY), (16, 12)))


def test_adamw_in_8_bits_is_that_of_bitsandbytes() -> None:
    ours = stepped(lambda p: adamw_8bit([Trained("w", p, 0)], paged=False, **ADAM), (70, 100))
    assert torch.equal(ours, stepped(lambda p: bitsandbytes.optim.AdamW8bit([p], **LIBRARY), (70, 100)))


@pytest.mark.parametrize(("shape", "rows", "blocks"), [((8, 12), 4, (2, 48)), ((8, 12), 1, (8, 12)), ((12,), 1, (1, 12))])
def test_adam_mini_is_adam_with_one_second_moment_a_block(shape: tuple[int, ...], rows: int, blocks: tuple[int, int]) -> None:
    ours = stepped(lambda p: adam_mini([Trained("w", p, 0, rows_per_head=rows)], **{**ADAM, "weight_decay": 0.0}), shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).view(blocks)
    first, second = torch.zeros(blocks), torch.zeros(blocks[0], 1)
    for count, gradient in enumerate(gradients(shape), start=1):
        gradient = gradient.view(blocks)
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient.square().mean(dim=1, keepdim=True)
        weight = weight - 0.01 * (first / (1 - 0.9**count)) / ((second / (1 - 0.95**count)).sqrt() + 1e-8)
    torch.testing.assert_close(ours, weight.view(shape))


def test_schedule_free_takes_gradients_between_the_fast_weights_and_their_average() -> None:
    """Algorithm 1 of Defazio et al. 2024, with x, y and z written out."""
    parameter = nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)))
    optimizer: Any = schedule_free([Trained("w", parameter, 0)], **ADAM)
    x = z = y = parameter.detach().clone()
    second, shares, highest = torch.zeros(8, 12), 0.0, 0.0
    for count, (gradient, lr) in enumerate(zip(gradients((8, 12)), (0.002, 0.004, 0.01, 0.01, 0.01, 0.01), strict=True), start=1):
        parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        highest = max(highest, lr)
        shares += highest**2
        second = 0.95 * second + 0.05 * gradient**2
        z = z - lr * (gradient / ((second / (1 - 0.95**count)).sqrt() + 1e-8) + 0.1 * y)
        x = x + highest**2 / shares * (z - x)
        y = 0.9 * x + 0.1 * z
        torch.testing.assert_close(parameter.detach(), y)
    trained = parameter.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(parameter.detach(), x)
    assert torch.equal(parameter.detach(), trained)


def test_moments_in_bf16_follow_those_in_float32() -> None:
    """Also where a step changes them by less than bf16 holds: the mean of many tensors' is the same."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = adamw_bf16([Trained("w", weight, 0)], **{**ADAM, "beta2": 0.999})
    for gradient in (1.0, *[0.5] * 60):
        weight.grad = torch.full((64, 64), gradient)
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    expected = 0.001 * 0.999**60 + 0.25 * (1 - 0.999**60)
    assert second.dtype == torch.bfloat16
    assert float(second.double().mean()) == pytest.approx(expected, rel=2e-3)


def test_rounding_by_chance_gives_neighbours_with_the_right_mean() -> None:
    value = torch.full((20_000,), -1.0 - 2**-7 * 0.25)
    rounded = rounded_by_chance(value, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {-1.0, -1.0 - 2**-7}
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert float(rounded.mean()) == pytest.approx(float(value[0]), rel=2e-4)


@pytest.mark.parametrize(
    ("order", "outside", "turns"),
    [
        ("ascending", False, [0, 0, 1, 1, 2, 2]),
        ("descending", False, [2, 2, 1, 1, 0, 0]),
        ("ascending", True, [3, 3, 0, 0, 1, 1]),
    ],
)
def test_badam_trains_a_layer_at_a_time_with_the_state_of_one(order: str, outside: bool, turns: list[int]) -> None:
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(4)]
    trained = [Trained("embed", weights[3], None), *[Trained(f"{n}", weights[n], n) for n in range(3)]]
    optimizer: Any = badam(trained, **ADAM, switch_every=2, order=order, outside_layers=outside)
    for turn in turns:
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.full((4, 4), 3.0)
        assert optimizer.in_turn(weights) == [weights[turn]]
        optimizer.step()
        assert [n for n in range(4) if not torch.equal(before[n], weights[n])] == [turn]
        assert all("exp_avg" not in optimizer.state[weight] for n, weight in enumerate(weights) if n != turn)


def test_badam_in_random_order_gives_each_layer_one_turn_a_lap() -> None:
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(5)]
    trained = [Trained(f"{n}", weight, n) for n, weight in enumerate(weights)]
    optimizer: Any = badam(trained, **ADAM, switch_every=1, order="random", outside_layers=False)
    turns = []
    for _ in range(10):
        for weight in weights:
            weight.grad = torch.ones(4, 4)
        (chosen,) = optimizer.in_turn(weights)
        turns += [n for n, weight in enumerate(weights) if weight is chosen]
        optimizer.step()
    assert sorted(turns[:5]) == sorted(turns[5:]) == list(range(5)) and turns[:5] != turns[5:]


LOW: dict[str, Any] = {**ADAM, "rank": 4, "update_every": 2, "scale": 0.5}
MUON: dict[str, Any] = {**ADAM, "momentum": 0.9, "nesterov": True, "adamw_lr_factor": 1.0, "adamw_moments": "float32"}
OF_MATRICES: dict[str, Callable[[list[Trained]], torch.optim.Optimizer]] = {
    "muon": lambda trained: muon(trained, **MUON),
    "galore": lambda trained: galore(trained, **LOW),
    "apollo by channel": lambda trained: apollo(trained, sizes="channel", **LOW),
    "apollo by tensor": lambda trained: apollo(trained, sizes="tensor", **LOW),
}


@pytest.mark.parametrize("shape", [(3, 16, 12), (3, 12, 16)])
@pytest.mark.parametrize("name", OF_MATRICES)
def test_experts_in_one_tensor_are_each_a_matrix_of_its_own(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is visited in every other step alone; by GaLore in those in which directions are chosen."""

    def first_directions(self: Apollo, gradient: Tensor, rank: int, seed: int) -> Tensor:
        return torch.eye(min(gradient.shape[-2:]))[:, :rank].expand(*gradient.shape[:-2], -1, -1)

    monkeypatch.setattr(Apollo, "projection", first_directions)  # it is drawn at random, apart for each tensor
    fused = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    apart, before = [nn.Parameter(matrix.detach().clone()) for matrix in fused], fused.detach().clone()
    optimizers = [OF_MATRICES[name]([Trained("experts", fused, 0)])]
    optimizers += [OF_MATRICES[name]([Trained("matrix", matrix, 0)]) for matrix in apart]
    for step, gradient in enumerate(gradients(shape)):
        gradient[1] *= (step + (name == "galore")) % 2
        fused.grad = gradient.clone()
        for matrix, own in zip(apart, gradient, strict=True):
            matrix.grad = own.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.stack(apart).detach(), rtol=1e-3, atol=1e-3)
    assert all(change > 5e-3 for change in (fused.detach() - before * (1 - 0.01 * 0.1) ** STEPS).abs().amax((1, 2)))


@pytest.mark.parametrize("name", OF_MATRICES)
def test_a_convolution_of_each_channel_is_no_matrix(name: str) -> None:
    shape = (12, 1, 4)
    found = stepped(lambda p: OF_MATRICES[name]([Trained("conv1d", p, 0)]), shape)
    as_vector = stepped(lambda p: OF_MATRICES[name]([Trained("conv1d", p, None)]), shape)
    assert torch.equal(found, as_vector)


@pytest.mark.parametrize("shape", [(3, 12), (12, 3), (4, 4)])
def test_galore_of_a_matrix_that_is_smaller_than_the_rank_is_adam_in_the_basis_of_its_shorter_side(
    shape: tuple[int, ...],
) -> None:
    """With the scale of all others (galore-torch 1.0 does so): one rate is for matrices of any size."""
    settings = {**ADAM, "weight_decay": 0.0}
    ours = stepped(lambda p: galore([Trained("w", p, 0)], rank=64, update_every=3, scale=0.25, **settings), shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first, second, tall = torch.zeros(shape), torch.zeros(shape), shape[0] >= shape[1]
    for count, gradient in enumerate(gradients(shape), start=1):
        if count % 3 == 1:
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        low = gradient @ right.T if tall else left.T @ gradient
        first, second = 0.9 * first + 0.1 * low, 0.95 * second + 0.05 * low**2
        step = (first / (1 - 0.9**count)) / (second / (1 - 0.95**count)).sqrt()
        weight = weight - 0.01 * 0.25 * (step @ right if tall else left @ step)
    torch.testing.assert_close(ours, weight, rtol=1e-4, atol=1e-5)

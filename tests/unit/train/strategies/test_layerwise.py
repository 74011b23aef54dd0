"""Tensors that step within the backward pass: the steps of a plain run that clips nothing, with few gradients at once."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from raytune_llm.config.load import load_config
from raytune_llm.config.optimizer import GRADIENTS_AT_ONCE, TrainedShape
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.strategies.base import StepOut, Training
from raytune_llm.train.strategies.ddp import DDPStrategy
from raytune_llm.train.strategies.layerwise import BEHIND
from tests.models import packed, some_rows, tiny_llama

CPU = torch.device("cpu")
LOW_RANK = ["optimizer.rank=4", "optimizer.update_every=2"]
OPTIMIZERS = {
    "adafactor": [],
    "adafactor as adalomo": ["optimizer.relative_to_weights=true"],
    "adam_mini": [],
    "adamw": ["optimizer.weight_decay=0.1"],
    "adamw_8bit": [],
    "adamw_bf16": [],
    "apollo": LOW_RANK,
    "galore": LOW_RANK,
    "lion": [],
    "muon": [],
    "schedule_free": ["schedule=constant"],
    "sgd": [],
    "sgd as lomo": ["optimizer.momentum=0"],
    "adamw by groups": ["optimizer.groups={embed_tokens:{lr_factor:0.5}}"],
}


def strategy_of(name: str, *, layerwise: bool) -> DDPStrategy:
    optimizer = f"optimizer={name.partition(' ')[0]}"
    section = load_config("train", ["data.path=x", optimizer, "optimizer.lr=1e-2", *OPTIMIZERS[name]]).optimizer
    policy = tiny_llama()
    policy.requires_grad_(True)
    build: Any = partial(build_optimizer, section)
    return DDPStrategy(policy, build, Training(CPU, torch.float32, max_grad_norm=None, layerwise=layerwise))


def one_step(strategy: DDPStrategy, number: int) -> StepOut:
    batch, lr = packed(some_rows([20, 9, 31], seed=number)), 1e-2 / (1 + number)
    with strategy.accumulate(last=True):
        strategy.backward(strategy.model(batch, cross_entropy).mean(), lr)
    return strategy.step(lr)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_and_state_are_those_of_the_plain_update(name: str) -> None:
    plain, layerwise = (strategy_of(name, layerwise=way) for way in (False, True))
    for number in range(3):
        theirs, ours = one_step(plain, number), one_step(layerwise, number)
        torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, rtol=1e-5, atol=0)
        assert not ours.skipped
    expected, found = plain.state(), layerwise.state()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert any(key.startswith("optimizer.") for key in found) == (name != "sgd as lomo")


@pytest.mark.parametrize("name", ["adafactor", "apollo", "muon", "sgd"])
def test_steps_that_wait_for_the_next_gradients_are_the_same(name: str) -> None:
    """As on a GPU. `plan` counts as many gradients."""
    assert BEHIND == GRADIENTS_AT_ONCE - 1
    plain, layerwise = (strategy_of(name, layerwise=way) for way in (False, True))
    assert layerwise.layerwise is not None
    layerwise.layerwise.behind = BEHIND
    for number in range(2):
        one_step(plain, number)
        assert not one_step(layerwise, number).skipped
        assert all(parameter.grad is None for parameter in layerwise.module.parameters())
    found = layerwise.state()
    for key, value in plain.state().items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon", "sgd"])
def test_a_step_of_one_tensor_goes_through_no_other(name: str) -> None:
    strategy, sizes = strategy_of(name, layerwise=True), list[int]()
    strategy.optimizer.register_step_pre_hook(
        lambda optimizer, *_: sizes.append(sum(len(group["params"]) for group in optimizer.param_groups))
    )
    one_step(strategy, 0)
    assert sizes == [1] * len(list(strategy.module.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    whole = strategy_of(name, layerwise=True)
    for number in range(2):
        one_step(whole, number)
    kept = {key: value.clone() for key, value in whole.state().items()}
    resumed = strategy_of(name, layerwise=True)

    def read(state: dict[str, torch.Tensor]) -> None:
        for key, value in state.items():
            value.copy_(kept[key])

    resumed.load(kept, read)
    for strategy in (whole, resumed):
        one_step(strategy, 2)
    for key, value in whole.state().items():
        assert torch.equal(resumed.state()[key], value), key


def test_no_more_than_one_gradient_is_there_at_once() -> None:
    def most(*, layerwise: bool) -> int:
        strategy, counts = strategy_of("adamw", layerwise=layerwise), []
        parameters = list(strategy.module.parameters())
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda _: counts.append(sum(p.grad is not None for p in parameters)))
        one_step(strategy, 0)
        return max(counts)

    assert most(layerwise=True) <= 1
    assert most(layerwise=False) == len(list(tiny_llama().parameters()))


@pytest.mark.parametrize(("name", "behind"), [*((name, 0) for name in OPTIMIZERS), ("sgd", 2)])
def test_a_gradient_that_is_not_finite_leaves_its_tensor_and_is_told(name: str, behind: int) -> None:
    strategy = strategy_of(name, layerwise=True)
    assert strategy.layerwise is not None
    strategy.layerwise.behind = behind
    bad: nn.Parameter = strategy.module.get_parameter("model.model.layers.0.mlp.up_proj.weight")
    assert not one_step(strategy, 0).skipped
    bad.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: value.clone() for name, value in strategy.state().items()}
    assert one_step(strategy, 1).skipped
    same = {name for name, value in strategy.state().items() if torch.equal(value, before[name])}
    assert same >= {name for name in before if "layers.0.mlp.up_proj" in name}
    assert {name for name in same if name.startswith("parameters.")} == {"parameters.model.model.layers.0.mlp.up_proj.weight"}


def test_micro_batches_that_are_to_add_up_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.layerwise must be false where a step has several micro-batches"):
        strategy_of("adamw", layerwise=True).accumulate(last=False)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], r"train\.max_grad_norm must be null with optimizer\.layerwise=true: .*got 1\.0"),
        (["train.max_grad_norm=null", "train.precision=fp16"], r"train\.precision must be bf16 or fp32 with"),
        (["train.max_grad_norm=null", "train.cuda_graphs=true"], r"train\.cuda_graphs must be false with"),
        (
            ["train.max_grad_norm=null", "train.micro_batch_size=1"],
            r"train\.micro_batch_size must be train\.global_batch_size / ",
        ),
        (["optimizer=badam"], r"optimizer\.layerwise must be false with optimizer=badam: it counts the steps"),
        (["strategy=zero3", "resources=local"], r"optimizer\.layerwise must be false with strategy=zero3: DeepSpeed collects"),
    ],
)
def test_what_needs_all_gradients_is_refused_by_name(overrides: list[str], said: str) -> None:
    sizes = ["train.global_batch_size=8", "train.micro_batch_size=8", "resources.num_workers=1"]
    with pytest.raises(ConfigError, match=said):
        load_config("train", ["data.path=x", *sizes, *overrides, "optimizer.layerwise=true"])


def test_lomo_and_adalomo_are_layerwise_and_keep_no_more_than_sums() -> None:
    lomo, adalomo = (
        load_config(
            "train", ["data.path=x", f"optimizer={name}", "train.max_grad_norm=null", "train.micro_batch_size=8"]
        ).optimizer
        for name in ("lomo", "adalomo")
    )
    assert (lomo.name, lomo.layerwise, sum(lomo.state_bytes([TrainedShape((8, 4), 0)]))) == ("sgd", True, 0)
    assert (adalomo.name, adalomo.layerwise, sum(adalomo.state_bytes([TrainedShape((8, 4), 0)]))) == (
        "adafactor",
        True,
        4 * (8 + 4),
    )


@pytest.mark.parametrize("workers", ["2", "[2,4]"])
def test_several_micro_batches_of_the_fewest_workers_are_refused_before_a_run(workers: str):
    words = ["data.path=x", "optimizer=lomo", "train.max_grad_norm=null", "train.global_batch_size=8", "train.micro_batch_size=2"]
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size must be train\.global_batch_size / workers \(8 / 2\)"):
        load_config("train", [*words, "resources=cluster", f"resources.num_workers={workers}"])


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_change_is_told_before_it_is_made(name: str, layerwise: bool) -> None:
    strategy = strategy_of(name, layerwise=layerwise)
    told: list[list[torch.Tensor]] = []
    strategy.before_change(lambda: told.append(weights_of(strategy)))
    before = weights_of(strategy)
    one_step(strategy, 0)
    after = weights_of(strategy)
    assert all(map(torch.equal, told[0], before)) and not all(map(torch.equal, told[0], after))
    steps = len(told)
    with strategy.averaged():
        assert all(map(torch.equal, told[steps], after))


@pytest.mark.parametrize("layerwise", [False, True])
def test_weights_are_freed_after_the_end(layerwise: bool) -> None:
    strategy = strategy_of("adafactor", layerwise=layerwise)
    one_step(strategy, 0)
    weights = weakref.ref(next(strategy.module.parameters()))
    gc.disable()
    try:
        strategy.close()
        del strategy
        assert weights() is None
    finally:
        gc.enable()


def weights_of(strategy: DDPStrategy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in strategy.module.parameters()]

"""Which parameters an optimizer takes, and how."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from raytune_llm.config.load import load_config
from raytune_llm.config.optimizer import OptimizerConfig
from raytune_llm.errors import ConfigError
from raytune_llm.train.optimizers import OPTIMIZERS, build_optimizer
from raytune_llm.train.optimizers.muon import Joined, Muon
from tests.models import tiny_llama


def settings(name: str, *overrides: str) -> OptimizerConfig:
    return load_config("train", ["data.path=rows.jsonl", f"optimizer={name}", *overrides]).optimizer


def names_in(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[set[str], dict]]:
    """Of each group: the last parts of its parameters' names but `weight`, and its settings."""
    called = {parameter: name for name, parameter in model.named_parameters()}

    def last(name: str) -> str:
        return next(part for part in reversed(name.split(".")) if part not in ("weight", "default"))

    return [({last(called[p]) for p in group["params"]}, group) for group in optimizer.param_groups]


PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    model = tiny_llama()
    optimizer = build_optimizer(settings("muon", "optimizer.adamw_lr_factor=0.5"), model, fused=True)
    assert isinstance(optimizer, Joined)
    matrices, wide, vectors = names_in(model, optimizer)
    assert (matrices[0], wide[0], vectors[0]) == (PROJECTIONS, {"embed_tokens", "lm_head"}, NORMS)
    assert isinstance(optimizer.parts[0], Muon) and matrices[1]["adjust_lr_fn"] == "match_rms_adamw"
    assert [group["weight_decay"] for _, group in (matrices, wide, vectors)] == [0.1, 0.1, 0.0]
    assert [group.get("lr_factor", 1.0) for _, group in (matrices, wide, vectors)] == [1.0, 0.5, 0.5]


def test_muon_takes_the_matrices_of_adapters() -> None:
    model = tiny_llama()
    get_peft_model(model.model, LoraConfig(r=4, target_modules="all-linear"))
    optimizer = build_optimizer(settings("muon"), model, fused=True)
    ((names, _),) = names_in(model, optimizer)
    assert names == {"lora_A", "lora_B"}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_vectors_are_not_decayed(name: str) -> None:
    model = tiny_llama()
    optimizer = build_optimizer(settings(name, "optimizer.weight_decay=0.5"), model, fused=True)
    assert [(names, group["weight_decay"]) for names, group in names_in(model, optimizer)] == [
        (PROJECTIONS | {"embed_tokens", "lm_head"}, 0.5),
        (NORMS, 0.0),
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_trained_parameter_has_the_state_that_memory_is_counted_with(name: str) -> None:
    model = tiny_llama()
    config = settings(name)
    optimizer = build_optimizer(config, model, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def size(parameters: Sequence[nn.Parameter]) -> int:
        return sum(value.numel() for p in parameters for value in optimizer.state[p].values() if value.ndim)

    inside = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    every = list(model.parameters())
    numels = sum(p.numel() for p in inside), sum(p.numel() for p in every)
    assert size(every) == config.state_size(matrices=numels[0], others=numels[1] - numels[0])


def test_gradient_descent_without_momentum_keeps_nothing() -> None:
    assert settings("sgd", "optimizer.momentum=0").state_size(matrices=5, others=3) == 0
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov needs a momentum, got True"):
        settings("sgd", "optimizer.momentum=0", "optimizer.nesterov=true")


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_muon_is_refused_where_matrices_are_flattened(strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy can't be {strategy} with optimizer=muon: it needs matrices"):
        settings("muon", f"strategy={strategy}")

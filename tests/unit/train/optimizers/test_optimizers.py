"""Which parameters an optimizer takes, and how."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from raytune_llm.config.load import load_config
from raytune_llm.config.optimizer import OptimizerConfig, TrainedShape
from raytune_llm.errors import ConfigError
from raytune_llm.train.optimizers import OPTIMIZERS, build_optimizer
from raytune_llm.train.optimizers.groups import set_learning_rate, trained_in
from raytune_llm.train.optimizers.muon import Joined, Muon
from tests.models import tiny_llama
from tests.unit.models.adapters.test_experts import mixture


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


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "adamw_8bit", "adamw_bf16"])
def test_vectors_are_not_decayed(name: str) -> None:
    model = tiny_llama()
    optimizer = build_optimizer(settings(name, "optimizer.weight_decay=0.5"), model, fused=True)
    assert [(names, group["weight_decay"]) for names, group in names_in(model, optimizer)] == [
        (PROJECTIONS | {"embed_tokens", "lm_head"}, 0.5),
        (NORMS, 0.0),
    ]


LOW_RANK = {"galore": ["optimizer.rank=8"], "apollo": ["optimizer.rank=8"]}


WHOLE_RANK = [(name, ["optimizer.rank=1000"]) for name in LOW_RANK]


@pytest.mark.parametrize(("name", "overrides"), [*((name, LOW_RANK.get(name, [])) for name in OPTIMIZERS), *WHOLE_RANK])
def test_every_trained_parameter_has_the_state_that_memory_is_counted_with(name: str, overrides: list[str]) -> None:
    model = tiny_llama()
    schedule = "constant" if name == "schedule_free" else "cosine"
    config = settings(name, f"schedule={schedule}", *overrides)
    optimizer = build_optimizer(config, model, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    kept = [(p.shape, value) for p in model.parameters() for value in optimizer.state[p].values() if value.ndim]
    like_weights = sum(value.nbytes for shape, value in kept if value.shape == shape)
    shapes = [TrainedShape(tuple(one.parameter.shape), one.layer) for one in trained_in(model)]
    counted = config.state_bytes(shapes)
    assert counted.like_weights == like_weights
    # APOLLO keeps one more number a matrix; a head of queries, which AdamMini keeps one number of, is counted as its rows.
    whole = sum(value.nbytes for _, value in kept) - like_weights
    assert counted.whole == pytest.approx(whole, rel=0.05, abs=4 * 32 * 6)


@pytest.mark.parametrize("name", ["muon", *LOW_RANK])
def test_the_matrices_of_experts_have_the_state_that_memory_is_counted_with(name: str) -> None:
    model = mixture()
    config = settings(name, *LOW_RANK.get(name, []))
    optimizer = build_optimizer(config, model, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    experts = {parameter: optimizer.state[parameter] for parameter in model.parameters() if parameter.ndim == 3}
    assert len(experts) == 4
    for parameter, state in experts.items():
        counted = config.state_bytes([TrainedShape(tuple(parameter.shape), 0)])
        assert sum(value.nbytes for value in state.values() if value.ndim) == pytest.approx(sum(counted), abs=4 * len(parameter))
        assert sum(counted) < 2 * parameter.nbytes  # what AdamW has


def test_gradient_descent_without_momentum_keeps_nothing() -> None:
    assert settings("sgd", "optimizer.momentum=0").state_bytes([TrainedShape((5, 3), 0)]) == (0, 0)
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov needs a momentum, got True"):
        settings("sgd", "optimizer.momentum=0", "optimizer.nesterov=true")


def test_groups_have_their_own_rate_and_decay() -> None:
    model = tiny_llama()
    groups = "optimizer.groups={embed: {lr_factor: 0.1}, 'layers\\.1\\..*norm': {weight_decay: 0.2}, norm: {lr_factor: 2.0}}"
    optimizer = build_optimizer(settings("adamw", "optimizer.weight_decay=0.5", groups), model, fused=True)
    found = [(names, group["weight_decay"], group.get("lr_factor", 1.0)) for names, group in names_in(model, optimizer)]
    assert found == [
        ({"embed_tokens"}, 0.5, 0.1),
        (PROJECTIONS | {"lm_head"}, 0.5, 1.0),
        (NORMS, 0.0, 2.0),
        (NORMS - {"norm"}, 0.2, 1.0),
    ]
    set_learning_rate(optimizer.param_groups, 3.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 3.0, 6.0, 3.0])


def test_a_group_that_takes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.groups must each take a trained parameter.*got 'norn'"):
        build_optimizer(settings("adamw", "optimizer.groups={norn: {lr_factor: 2.0}}"), tiny_llama(), fused=True)


def test_schedule_free_is_refused_with_a_schedule_that_falls() -> None:
    with pytest.raises(ConfigError, match="schedule must be constant with optimizer=schedule_free"):
        settings("schedule_free", "schedule=cosine")


def test_an_average_that_can_not_be_told_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.beta1 must be above 0"):
        settings("schedule_free", "schedule=constant", "optimizer.beta1=0")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage=reward", "data=chat_pairs", "adapter=none"], "the score head"),
        (["stage=reward", "data=chat_pairs"], "the score head"),
        (["model.new_tokens=['<a>']", "adapter=none"], "embeddings of new tokens"),
        (["adapter=freeze", "adapter.last_layers=1", "adapter.extra_modules=[norm]"], r"adapter\.extra_modules"),
    ],
)
def test_badam_takes_what_a_run_brings_outside_of_the_layers_or_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.outside_layers must be true to train what the run brings: {said}"):
        settings("badam", *overrides)
    assert settings("badam", *overrides, "optimizer.outside_layers=true").trains_outside


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_pages_are_refused_in_shards(strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy can't be {strategy} with"):
        settings("paged_adamw_8bit", f"strategy={strategy}", "resources=local")
    assert settings("adamw_8bit", "strategy=fsdp", "resources=local").refuses_shards is None


def test_pages_are_refused_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.paged needs a CUDA GPU"):
        build_optimizer(settings("paged_adamw_8bit"), tiny_llama(), fused=True)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("adamw", "sgd", "lion", "muon")])
def test_what_needs_whole_tensors_is_refused_by_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy can't be zero2 with optimizer={name}: "):
        settings(name, "strategy=zero2", "schedule=constant")


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_muon_is_refused_where_matrices_are_flattened(strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy can't be {strategy} with optimizer=muon: it needs matrices"):
        settings("muon", f"strategy={strategy}")

"""Liger's layers are put in by name, and refused where they can't run. Their numbers: tests/gpu/test_liger.py."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm import api, load_config
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.grouped import GroupedAttention
from raytune_llm.models.liger import LigerMLP, LigerNorm, check_liger, rotate, with_liger
from tests.runs import tiny_run

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def made(kind: str):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))


def test_a_run_without_a_gpu_is_refused_before_anything_is_prepared(chat_rows, tmp_path):
    run = tiny_run(chat_rows, str(tmp_path / "cache"), tmp_path / "run", "model.liger_kernel=true")
    with pytest.raises(ConfigError, match=r"model.liger_kernel must be false without a GPU: its kernels are Triton's"):
        api.train(run)
    assert not (tmp_path / "cache").exists()


def test_layers_with_its_kernels_are_not_compiled():
    settings = ["data.path=x", "model=tiny_random", "model.liger_kernel=true"]
    assert load_config("train", settings).uncompiled == "model.liger_kernel has kernels of its own in the layers"
    with pytest.raises(ConfigError, match=r"train.compile can't be true: model.liger_kernel"):
        load_config("train", [*settings, "train.compile=true"])


@pytest.mark.parametrize("kind", ["gpt2", "phi"])
def test_a_model_without_layers_that_it_knows_is_refused_by_name(kind, monkeypatch):
    monkeypatch.setattr("raytune_llm.models.liger.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=f"must be false for {kind}"):
        check_liger(made(kind), "cuda")


@pytest.mark.parametrize(
    ("kind", "norms", "mlps", "attentions"), [("llama", 5, 2, 2), ("qwen3", 9, 2, 2), ("gemma", 5, 0, 0), ("phi3", 5, 0, 0)]
)
def test_layers_take_the_place_of_others_under_their_names_and_with_their_weights(kind, norms, mlps, attentions, monkeypatch):
    monkeypatch.setattr("raytune_llm.models.liger.find_spec", lambda name: object())
    model = made(kind)
    before = dict(model.named_parameters())
    with_liger(model, "cuda")
    assert {name: id(value) for name, value in model.named_parameters()} == {name: id(value) for name, value in before.items()}
    found = [sum(isinstance(module, known) for module in model.modules()) for known in (LigerNorm, LigerMLP, GroupedAttention)]
    assert found == [norms, mlps, attentions]
    assert all(module.rotate is rotate for module in model.modules() if isinstance(module, GroupedAttention))
    assert all(module.eps == 1e-6 or module.eps == 1e-5 for module in model.modules() if isinstance(module, LigerNorm))

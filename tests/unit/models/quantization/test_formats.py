"""Checkpoints by GPTQ, AWQ, AQLM, bitsandbytes and HQQ are read as the numbers that they stand for, and trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from raytune_llm.config.quantization import NF4
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models.build import build_policy
from raytune_llm.models.load import files_to_read, load_config, load_model
from raytune_llm.models.policy import Policy
from raytune_llm.models.quantization import prequantized
from tests.models import lora_section, model_section, packed, some_rows
from tests.quantized_files import GROUP, SIZES, Packed, aqlm, awq, gptq, hqq, replaced, saved, say

CPU = torch.device("cpu")


def policy_of(folder: Path, **settings: Any) -> Policy:
    config = load_config(str(folder), {})
    assert files_to_read(config, str(folder)) is None, "what the files hold is no weight"
    section = model_section(path=str(folder))
    return build_policy(config, section, lora_section(), compute=torch.float32, seed=0, device=CPU, **settings)[0]


def check_trains(policy: Policy, expected: Mapping[str, Tensor]) -> None:
    for name, weight in expected.items():
        layer = policy.base.get_submodule(name.removesuffix(".weight"))
        assert type(layer.base_layer) is torch.nn.Linear
        torch.testing.assert_close(layer.base_layer.weight.detach(), weight, rtol=1e-6, atol=1e-6)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    policy(packed(some_rows([20, 9])), cross_entropy).sum().backward()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(expected)
    assert all(parameter.grad is not None for parameter in trained)
    assert getattr(policy.base.config, "quantization_config", None) is None, "what is saved of it is not quantized"


@pytest.mark.parametrize(
    ("bits", "layout", "symmetric", "desc_act"),
    [
        (4, "gptq", True, False),
        (4, "gptq", False, True),
        (4, "gptq_v2", False, False),
        (8, "gptq", False, False),
        (8, "gptq_v2", False, True),
        (3, "gptq", False, True),
        (3, "gptq_v2", True, False),
        (2, "gptq", False, False),
    ],
)
def test_gptq(bits: int, layout: str, symmetric: bool, desc_act: bool, tmp_path: Path) -> None:
    unquantized = saved(tmp_path).state_dict()
    pack = gptq(bits, layout, symmetric=symmetric, desc_act=desc_act)
    told = {"bits": bits, "group_size": GROUP, "sym": symmetric, "desc_act": desc_act, "checkpoint_format": layout}
    expected = replaced(tmp_path, pack, quant_method="gptq", **told)
    policy = policy_of(tmp_path)
    check_trains(policy, expected)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(policy.base.get_parameter(name), unquantized[name])


def test_gptq_without_the_groups_of_inputs_has_them_in_order(tmp_path: Path) -> None:
    saved(tmp_path)

    def without(weight: Tensor) -> Packed:
        parts, stands_for = gptq(4)(weight)
        return {name: part for name, part in parts.items() if name != "g_idx"}, stands_for

    expected = replaced(tmp_path, without, quant_method="gptq", bits=4, group_size=GROUP)
    check_trains(policy_of(tmp_path), expected)


def test_layers_with_more_bits_than_gptqs_config_says_are_read_too(tmp_path: Path) -> None:
    saved(tmp_path)
    some_of_eight = {"dynamic": {r".*down_proj.*": {"bits": 8}}}

    def mixed(weight: Tensor) -> Packed:
        return gptq(8 if weight.shape[1] == SIZES["intermediate_size"] else 4)(weight)

    expected = replaced(tmp_path, mixed, quant_method="gptq", bits=4, group_size=GROUP, **some_of_eight)
    check_trains(policy_of(tmp_path), expected)


def test_awq(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = replaced(tmp_path, awq, quant_method="awq", bits=4, group_size=GROUP, version="gemm", zero_point=True)
    check_trains(policy_of(tmp_path), expected)


def test_aqlm(tmp_path: Path) -> None:
    saved(tmp_path)
    told = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8}
    expected = replaced(tmp_path, aqlm, quant_method="aqlm", **told)
    check_trains(policy_of(tmp_path), expected)


@pytest.mark.parametrize(
    "told",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_bitsandbytes_as_transformers_saves_it(told: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, intermediate_size=128)  # on a CPU bitsandbytes unpacks rows of whole blocks alone right
    held = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**told), device_map={"": "cpu"})
    folder = tmp_path / "bits"
    held.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    kept = any(".SCB" in name or "quant_state" in name for name in load_file(folder / "model.safetensors"))
    assert kept, "it is in few bits"
    plain = held.dequantize(torch.float32)
    expected = {f"{name}.weight": x.weight.detach() for name, x in plain.named_modules() if name.endswith("_proj")}
    check_trains(policy_of(folder), expected)


def test_hqq_as_its_layers_save_themselves(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = replaced(tmp_path, hqq, quant_method="hqq", quant_config={"nbits": 4})
    check_trains(policy_of(tmp_path), expected)


@pytest.mark.parametrize(("pack", "method"), [(gptq(4), "gptq"), (awq, "awq")])
def test_experts_are_unpacked_before_they_are_joined(pack: Callable[[Tensor], Packed], method: str, tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    expected = replaced(tmp_path, pack, quant_method=method, bits=4, group_size=GROUP)
    policy = policy_of(tmp_path)
    experts = policy.base.get_submodule("model.layers.1.mlp.experts")
    for expert in range(4):
        gate, up, down = (expected[f"model.layers.1.mlp.experts.{expert}.{x}_proj.weight"] for x in ("gate", "up", "down"))
        torch.testing.assert_close(experts.get_parameter("gate_up_proj")[expert], torch.cat([gate, up]))
        torch.testing.assert_close(experts.get_parameter("down_proj")[expert], down)
    policy(packed(some_rows([20, 9])), cross_entropy).sum().backward()


def test_a_quantization_may_follow(tmp_path: Path) -> None:
    saved(tmp_path)
    replaced(tmp_path, gptq(4, symmetric=True), quant_method="gptq", bits=4, group_size=GROUP)
    policy = policy_of(tmp_path, quantization=NF4(name="bnb_nf4"))
    policy(packed(some_rows([20, 9])), cross_entropy).sum().backward()
    assert "NF4Linear" in {type(module).__name__ for module in policy.modules()}


def test_what_is_saved_of_a_whole_model_is_an_ordinary_one(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    expected = replaced(tmp_path, gptq(4), quant_method="gptq", bits=4, group_size=GROUP)
    config, folder = load_config(str(tmp_path), {}), tmp_path / "saved"
    model = load_model(config, str(tmp_path), weights="pretrained", dtype=torch.float32, seed=0)
    model.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    again = load_file(folder / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(again[name], weight)


@pytest.mark.parametrize(
    ("family", "told", "why"),
    [
        ("llama", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "the layout marlin"),
        ("llama", {"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "the layout marlin"),
        ("llama", {"quant_method": "gptq", "bits": 6}, "6 bits"),
        ("llama", {"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "words of int16"),
        ("llama", {"quant_method": "awq", "bits": 4, "version": "gemv"}, "the version gemv"),
        ("llama", {"quant_method": "awq", "bits": 3}, "3 bits"),
        ("gpt_neox", {"quant_method": "awq", "bits": 4}, "scales within the activations of gpt_neox"),
    ],
)
def test_a_variant_that_can_not_be_read_is_refused_before_anything_is_loaded(
    family: str, told: dict[str, Any], why: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    say(tmp_path, **told)
    with pytest.raises(ConfigError, match=rf"model\.path holds weights by .* that can't be read here: {why}.*bnb_nf4"):
        load_config(str(tmp_path), {})


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq"])
def test_a_package_that_computes_the_weights_and_is_missing_is_named(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = prequantized.NEEDS_PACKAGE[method][1]
    monkeypatch.setitem(prequantized.NEEDS_PACKAGE, method, ("no_such_package", extra))
    saved(tmp_path)
    say(tmp_path, quant_method=method, load_in_4bit=True)
    with pytest.raises(ConfigError, match=rf"holds weights by {method}, which needs no_such_package .*{re.escape(extra)}"):
        load_config(str(tmp_path), {})

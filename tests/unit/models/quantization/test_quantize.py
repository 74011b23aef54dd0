"""Which layers are quantized, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.config.load import load_config as load_run
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models import attention
from raytune_llm.models.adapters import OWN, adapt
from raytune_llm.models.build import room_for
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.layers import layers
from raytune_llm.models.load import files_to_read, load_config, load_model
from raytune_llm.models.quantization import (
    QUANTIZATIONS,
    QuantizedLinear,
    check_device,
    described,
    linears_but,
    quantize,
    replace,
)
from raytune_llm.models.quantization.fp8 import FP8, FP8Linear
from raytune_llm.models.quantization.int8 import hold_experts
from raytune_llm.models.quantization.nf4 import NF4
from raytune_llm.models.stored import bring
from tests.models import lora_section, packed, some_rows, tiny_llama
from tests.unit.models.adapters.test_experts import mixture


def config_of(name: str) -> QuantizationConfig:
    return load_run("train", ["data.path=rows.jsonl", f"quantization={name}"]).quantization


@pytest.mark.parametrize("adapted", [True, False], ids=["under adapters", "bare"])
def test_layers_that_stay_wide_are_left_out_by_name(adapted: bool) -> None:
    model = tiny_llama().model
    if adapted:
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    every, some = (linears_but(layers(model), wide) for wide in ([], ["q_proj", "o_proj"]))
    assert (len(every), len(some)) == (2 * 7, 2 * 5)
    left = {id(linear) for *_, linear in every} - {id(linear) for *_, linear in some}
    wide = [layer.self_attn.get_submodule(name) for layer in layers(model) for name in ("q_proj", "o_proj")]
    assert left == {id(getattr(linear, "base_layer", linear)) for linear in wide}


def test_by_itself_what_makes_queries_keys_and_values_stays_wide() -> None:
    found = linears_but(layers(tiny_llama().model), "auto")
    assert {name for _, name, _ in found} == {"o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantization\.skip_modules must name linear layers .* down_proj, gate_proj"):
        linears_but(layers(tiny_llama().model), ["query"])


def test_a_weight_in_a_file_is_read_as_its_layer_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path)
    tiny_llama().base.save_pretrained(path)
    config = load_config(path, {})
    settings = {"weights": "pretrained", "dtype": torch.bfloat16, "seed": 0}
    loaded = load_model(config, path, **settings)
    stored = load_model(config, path, files=files_to_read(config, path), **settings)
    cpu = torch.device("cpu")
    for model in (loaded, stored):
        model.requires_grad_(False)
        replace(linears_but(layers(model), "auto"), FP8Linear, cpu)
    bring(stored, cpu)
    assert described(layers(stored), config_of("fp8")) == "fp8 for 8 linear layers, not for k_proj, q_proj, v_proj"
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (stored, loaded))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (type(ours[name]), ours[name].dtype) == (type(tensor), tensor.dtype)
        assert torch.equal(ours[name].float(), tensor.float())


def test_a_weight_in_other_memory_comes_to_the_device_as_its_layer_is_replaced_and_no_sooner() -> None:
    """So a device never holds more of the unquantized model than a layer. torch's meta device stands for it."""
    model, elsewhere = tiny_llama().model.requires_grad_(False), torch.device("meta")
    seen = []

    def kind(linear: torch.nn.Linear) -> torch.nn.Module:
        seen.append((linear.weight.device.type, sum(weight.device == elsewhere for weight in model.parameters())))
        return torch.nn.Identity()

    replace(linears_but(layers(model), []), kind, elsewhere)
    assert seen == [("meta", 1)] * 14


def test_what_does_not_fit_unquantized_is_loaded_to_host_memory() -> None:
    with torch.device("meta"):
        model = tiny_llama().base
    needed, device = 4 * sum(weight.numel() for weight in model.parameters()), torch.device("cuda")
    assert room_for(model, device, free_bytes=2 * needed) == device
    assert room_for(model, device, free_bytes=needed) == torch.device("cpu")
    model.config.quantization_config = {"quant_method": "fp8"}  # packed and unpacked weights are there at once
    assert room_for(model, device, free_bytes=2 * needed) == torch.device("cpu")
    assert room_for(model, device, free_bytes=3 * needed) == device


def test_models_with_nothing_to_quantize_are_refused() -> None:
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=97))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 97}
    mixtral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", num_key_value_heads=2, **sizes))
    for model, kind, said in (
        (gpt2, "bnb_nf4", "finds no linear layer"),
        (mixtral, "hqq", "must be fp8, bnb_nf4, bnb_fp4, bnb_int8 or none for mixtures of experts"),
    ):
        with pytest.raises(ConfigError, match=f"quantization {said}"):
            quantize(layers(model.requires_grad_(False)), config_of(kind), torch.device("cpu"))


def test_a_convolution_is_no_mixture_of_experts() -> None:
    layer = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3, groups=8), torch.nn.Linear(16, 16)).requires_grad_(False)
    quantize([layer], config_of("bnb_int8"), torch.device("cpu"))
    assert [type(part).__name__ for part in layer] == ["Conv1d", "Int8Linear"]


def test_what_a_device_lacks_is_said() -> None:
    assert FP8.lacks("cuda", (9, 0)) is None
    assert FP8.lacks("cuda", (8, 0)) == "it needs a GPU of compute capability 9.0, this one has 8.0"
    assert FP8.lacks("cpu", (0, 0)) == "it needs a GPU"
    assert NF4.lacks("cpu", (0, 0)) is None
    with pytest.raises(ConfigError, match=r"quantization can't be fp8 here: it needs a GPU\. Set quantization=none."):
        check_device(config_of("fp8"), torch.device("cpu"))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NF4, "package", "bytesandbits")
    with pytest.raises(ConfigError, match=r"can't be bnb_nf4 here: bytesandbits is not installed. Install it: pip install"):
        check_device(config_of("bnb_nf4"), torch.device("cpu"))


def test_layers_of_sizes_that_do_not_fit_are_named() -> None:
    linear = torch.nn.Linear(24, 32, bias=False)
    assert FP8().misfit(linear) == "32 x 24 are not multiples of 16"
    assert FP8().misfit(torch.nn.Linear(16, 32)) is None
    assert NF4().misfit(linear) is None
    assert NF4().misfit(torch.nn.Linear(3, 5)) == "5 x 3 weights are an odd number, and a byte holds two"


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_settings_and_layers_agree_on_what_can_be_trained(name: str) -> None:
    section, kind = config_of(name), QUANTIZATIONS[name]
    assert section.replaces_layers == (kind is not None)
    assert section.trains_base == (kind is None or kind.trained_layer is not None)


def test_weights_that_are_trained_are_not_held_in_four_bits() -> None:
    with pytest.raises(ConfigError, match="quantization needs frozen weights, got 'bnb_nf4'"):
        quantize(layers(tiny_llama().model), config_of("bnb_nf4"), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["bnb_nf4", "bnb_fp4", "bnb_int8"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_frozen_experts_are_held_in_few_bits_and_computed_as_the_weights_these_stand_for(kind: str, model_type: str) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
    base, plain = mixture(model_type, **sizes), mixture(model_type, **sizes)
    attention.attach(base, "varlen")
    attention.attach(plain, "varlen")
    adapted = adapt(base, lora_section())
    quantize(layers(base), config_of(kind), torch.device("cpu"))
    said = described(layers(base), config_of(kind))
    assert said is not None and "and the experts of 2 layers" in said
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            module, _, last = name.rpartition(".")
            layer: Any = base.get_submodule(module)
            if isinstance(layer, LoraLayer):
                layer = layer.get_base_layer()
            if isinstance(layer, QuantizedLinear) and last == "weight":
                weight.copy_(layer.transposed(torch.eye(layer.out_features), *layer.weights()))
            elif weight.ndim == 3:
                assert layer.parametrizations[last].original.dtype == torch.uint8
                near = getattr(layer, last)
                assert (0.001 if kind == "bnb_int8" else 0.01) < (near - weight).norm() / weight.norm() < 0.2
                weight.copy_(near)
    policy, batch = CausalLM(adapted.model, adapters=adapted), packed(some_rows([7, 12, 9]))
    for _ in range(2):
        values = policy(batch, cross_entropy)
        torch.testing.assert_close(values, CausalLM(plain)(batch, cross_entropy), rtol=1e-4, atol=1e-4)
    values.sum().backward()
    trained = adapted.trained(OWN)
    assert trained and all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_fp8_are_read_as_their_rows_times_their_scales(dtype: torch.dtype) -> None:
    """What a GPU does with them is as for any weight: they are unpacked before."""
    torch.manual_seed(0)
    weight = torch.randn(3, 32, 48, dtype=dtype)
    weight[1, 5] *= 1000  # a row by itself
    experts = torch.nn.Module()
    experts.register_parameter("gate_up_proj", torch.nn.Parameter(weight.clone(), requires_grad=False))
    replaces_experts = FP8.replaces_experts
    assert replaces_experts is not None
    replaces_experts(experts, "gate_up_proj")
    (held,) = experts.parameters()
    assert held.dtype == torch.uint8 and held.shape == weight.shape and not held.requires_grad
    read: Any = experts.gate_up_proj
    assert read.dtype == dtype and not read.requires_grad
    steps = weight.float().abs().amax(-1, keepdim=True) / 448
    assert ((read.float() - weight.float()).abs() <= weight.float().abs() / 14 + steps / 256).all()
    assert FP8().expert_bits == 8.0


def test_experts_are_unpacked_once_a_pass() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.randn(2, 16, 16), requires_grad=False)

        def forward(self, fails: bool = False) -> bool:
            first = self.down_proj
            if fails:
                raise RuntimeError("ends within")
            return self.down_proj is first

    experts = Experts()
    hold_experts(experts, "down_proj")
    assert experts()
    with pytest.raises(RuntimeError, match="ends within"):
        experts(fails=True)
    assert experts.down_proj is not experts.down_proj, "nothing is kept after a pass"


def test_an_adapter_on_experts_is_refused_over_a_quantized_base() -> None:
    with pytest.raises(ConfigError, match=r"can't be bnb_nf4 with adapter=lora: adapter\.experts=true adds to the weights"):
        load_run("train", ["data.path=x", "adapter.experts=true", "quantization=bnb_nf4"])

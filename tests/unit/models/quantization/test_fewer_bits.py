"""What adapters train on over weights in fewer bits, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from torch import Tensor, nn

from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models.adapters import OWN
from raytune_llm.models.adapters.dora import squares_of
from raytune_llm.models.build import build_policy
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.models.load import load_model
from raytune_llm.models.quantization import QUANTIZATIONS, QuantizedLinear
from raytune_llm.models.quantization.fp8 import FP8Linear
from tests.models import lora_section, model_section, packed, some_rows, tiny_llama

CPU = torch.device("cpu")
KINDS = ["bnb_nf4", "bnb_fp4", "bnb_int8", "hqq"]
ERROR = {"bnb_nf4": 0.12, "bnb_fp4": 0.16, "bnb_int8": 0.012, "hqq": 0.1}
"""Of normally distributed weights, by norm."""


def weight_of(layer: QuantizedLinear) -> Tensor:
    """[N, K]: what the layer multiplies with."""
    return layer.transposed(torch.eye(layer.out_features), *layer.weights())


def kind_of(name: str) -> type[QuantizedLinear]:
    found = QUANTIZATIONS[name]
    assert found is not None
    return found.layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_one_weight_near_the_original(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 48, dtype=dtype).requires_grad_(False)
    layer = kind_of(kind)(linear)
    weight = weight_of(layer)
    assert 0 < (weight - linear.weight).norm() / linear.weight.norm() < ERROR[kind]
    x = torch.randn(3, 5, 128, dtype=dtype, requires_grad=True)
    y, near = layer(x), {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, x @ weight.to(dtype).T + linear.bias, **near)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(gradient, upstream @ weight.to(dtype), **near)


def test_fp4_is_what_bitsandbytes_itself_makes_of_it() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 48).requires_grad_(False)
    packed_weight, state = quantize_4bit(linear.weight.detach(), quant_type="fp4", blocksize=64, compress_statistics=True)
    torch.testing.assert_close(weight_of(kind_of("bnb_fp4")(linear)), dequantize_4bit(packed_weight, state))


def test_eight_bits_are_rounded_to_the_nearest_of_a_row() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).requires_grad_(False)
    steps = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((weight_of(kind_of("bnb_int8")(linear)) - linear.weight).abs() <= 0.6 * steps).all()


def policy(folder: Path, quantization: str, adapter: Any) -> CausalLM:
    section = load_config("train", ["data.path=x", f"quantization={quantization}"]).quantization
    settings = {"compute": torch.float32, "seed": 0, "device": CPU}
    config = load_model_config(str(folder), {})
    return build_policy(config, model_section(path=str(folder)), adapter, quantization=section, **settings)[0]  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


ADAPTERS = ["lora", "rslora", "lora_plus", "dora", "dora,rslora", "pissa", "loftq", "eva", "oft", "vera", "ia3"]


def section(name: str, *overrides: str) -> Any:
    """name: of a method, and of variants of LoRA beside it."""
    method, *variants = name.split(",")
    others = {"oft": ["adapter.block_size=8"], "vera": ["adapter.rank=8"], "ia3": []}
    own = others.get(method, ["adapter.rank=4", "adapter.alpha=4"])
    more = [f"adapter.{variant}=true" for variant in variants]
    return load_config("train", ["data.path=x", f"adapter={method}", "quantization=bnb_nf4", *own, *more, *overrides]).adapter


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quantization", KINDS)
def test_an_adapter_learns_over_the_base_which_stays_and_is_the_same_in_plain_peft(
    adapter: str, quantization: str, folder: Path, tmp_path: Path
) -> None:
    trained, batch = policy(folder, quantization, section(adapter)), packed(some_rows([20, 9, 31]))
    quantized = {name: m for name, m in trained.base.named_modules() if isinstance(m, QuantizedLinear)}
    before = {name: buffer.clone() for name, buffer in trained.base.named_buffers()}
    frozen = {name: p.clone() for name, p in trained.base.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = trained(batch, cross_entropy).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(quantized) == 2 * 7
    assert all(torch.equal(buffer, before[name]) for name, buffer in trained.base.named_buffers())
    assert all(torch.equal(dict(trained.base.named_parameters())[name], value) for name, value in frozen.items())
    if adapter == "pissa":
        return  # its base is what is left of the weights, quantized: the adapter is for the original ones
    trained.adapters.save(OWN, tmp_path / "adapter")
    plain = load_model(load_model_config(str(folder), {}), str(folder), weights="pretrained", dtype=torch.float32, seed=0)
    with torch.no_grad():
        for name, layer in quantized.items():
            plain.get_submodule(name.removesuffix(".base_layer")).weight.copy_(weight_of(layer))
    ids = torch.arange(20)[None]
    elsewhere = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        trained.base.set_attn_implementation("eager")
        torch.testing.assert_close(trained.base.eval()(ids).logits, elsewhere(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", KINDS)
def test_a_new_dora_begins_as_the_quantized_base_and_a_continued_one_as_it_was_saved(
    quantization: str, folder: Path, tmp_path: Path
) -> None:
    begun, batch = policy(folder, quantization, section("dora")), packed(some_rows([20, 9, 31]))
    with torch.no_grad():
        with begun.adapters.using(None):
            bare = begun(batch, cross_entropy)
        torch.testing.assert_close(begun(batch, cross_entropy), bare, rtol=1e-5, atol=1e-5)
        for parameter in begun.adapters.trained(OWN).values():
            parameter += 0.1 * torch.randn_like(parameter)
        learned = begun(batch, cross_entropy)
        assert (learned - bare).abs().max() > 0.01
        begun.adapters.save(OWN, tmp_path / "adapter")
        continued = policy(folder, quantization, section("dora", f"adapter.path={tmp_path / 'adapter'}"))
        torch.testing.assert_close(continued(batch, cross_entropy), learned, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["pissa,dora", "loftq,dora", "eva,dora"])
def test_lengths_over_a_quantized_base_are_those_of_what_the_adapter_begins_as(kind: str, folder: Path) -> None:
    with_lengths, without = (policy(folder, "bnb_nf4", section(name)) for name in (kind, kind.partition(",")[0]))
    batch = packed(some_rows([20, 9, 31]))
    with torch.no_grad():
        torch.testing.assert_close(with_lengths(batch, cross_entropy), without(batch, cross_entropy), rtol=1e-4, atol=1e-4)


def test_lengths_of_rows_in_fp8_are_read_in_the_type_of_what_asks() -> None:
    torch.manual_seed(0)
    layer = FP8Linear(nn.Linear(48, 32).requires_grad_(False))
    held = layer.forward_weight.float() * layer.forward_scale.T  # type: ignore[operator, union-attr]
    x = torch.randn(5, 48)
    torch.testing.assert_close(layer.unpacked_product(x), x @ held.T)
    torch.testing.assert_close(squares_of(layer), held.square().sum(1))


def test_loftq_begins_as_the_best_of_its_rank_for_what_quantization_lost(folder: Path) -> None:
    original, loftq = tiny_llama().base, policy(folder, "bnb_nf4", section("loftq"))
    name = "model.layers.0.mlp.down_proj"
    layer: Any = loftq.base.get_submodule(name)
    lost = original.get_submodule(name).weight - weight_of(layer.base_layer)
    left = lost - layer.scaling[OWN] * layer.lora_B[OWN].weight @ layer.lora_A[OWN].weight
    torch.testing.assert_close(left.norm(), torch.linalg.svdvals(lost)[4:].norm(), rtol=1e-3, atol=1e-6)
    batch = packed(some_rows([20, 9, 31]))
    with torch.no_grad():
        truth = tiny_llama()(batch, cross_entropy)
        far = (policy(folder, "bnb_nf4", lora_section())(batch, cross_entropy) - truth).norm()
        assert (loftq(batch, cross_entropy) - truth).norm() < far


def test_loftq_without_a_quantized_base_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantization must be one with adapter=loftq, .* got 'none'"):
        load_config("train", ["data.path=x", "adapter=loftq"])

"""Models whose files hold quantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm import api
from raytune_llm.config.load import load_config as load_run
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models.build import build_policy
from raytune_llm.models.load import files_to_read, load_config, load_model
from raytune_llm.models.quantization import prequantized
from tests.models import lora_section, model_section, packed, some_rows
from tests.quantized_files import say

BLOCK = 128
SIZES = {"vocab_size": 384, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
E4M3 = torch.float8_e4m3fn


def blocks_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """In FP8, with a scale for each block, as DeepSeek's files have them."""
    n, k = (size // BLOCK for size in weight.shape)
    blocks = weight.view(n, BLOCK, k, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(E4M3).max
    return (blocks / scales[:, None, :, None]).view(weight.shape).to(E4M3), scales


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(tmp_path)
    return tmp_path


def test_blocks_of_fp8_are_read_as_the_numbers_that_they_stand_for_and_trained_on(folder: Path) -> None:
    weights, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rounded, scales = blocks_of(weights[name])
        wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        expected[name], weights[name], weights[f"{name}_scale_inv"] = rounded.float() * wide, rounded, scales
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic", fmt="e4m3")
    config = load_config(str(folder), {})
    assert files_to_read(config, str(folder)) is None
    policy, _ = build_policy(
        config, model_section(path=str(folder)), lora_section(), compute=torch.float32, seed=0, device=torch.device("cpu")
    )
    assert len(expected) == 7
    for name, weight in expected.items():
        layer = policy.base.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(layer.base_layer.weight.detach(), weight, rtol=1e-6, atol=1e-7)
    policy(packed(some_rows([20, 9])), cross_entropy).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)
    assert getattr(policy.base.config, "quantization_config", None) is None, "what is saved of it is not quantized"


def test_beside_blocks_of_fp8_all_weights_are_in_the_type_of_the_run(folder: Path) -> None:
    """What is trained is trained in float32, whatever the files have."""
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weights[name], weights[f"{name}_scale_inv"] = blocks_of(weights[name].float())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic", fmt="e4m3")
    config = load_config(str(folder), {})
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(config, str(folder), weights="pretrained", dtype=dtype, seed=0)
        assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.mark.parametrize("format", ["w8a8", "w4a16", "fp8"])
def test_compressed_tensors_are_read_as_plain_transformers_reads_them_and_trained_on(
    format: str, folder: Path, tmp_path: Path
) -> None:
    byte_tokenizer().save_pretrained(folder)
    place = tmp_path / "out"
    settings = [f"model.path={folder}", f"export.output_dir={place}", f"export.format={format}", "export.check=false"]
    api.export(load_run("export", settings))
    config = load_config(str(place), {})
    policy, _ = build_policy(
        config, model_section(path=str(place)), lora_section(), compute=torch.float32, seed=0, device=torch.device("cpu")
    )
    elsewhere = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ids = torch.arange(20)[None]
        elsewhere(ids)  # what is packed is unpacked in the first pass
        name = "model.layers.0.mlp.up_proj"
        weight = policy.base.get_submodule(name).base_layer.weight
        assert type(policy.base.get_submodule(name).base_layer) is torch.nn.Linear
        assert 0.001 < (weight - original.get_submodule(name).weight).norm() / weight.norm() < 0.2
        torch.testing.assert_close(weight, elsewhere.get_submodule(name).weight, rtol=1e-5, atol=1e-6)
    policy(packed(some_rows([20, 9])), cross_entropy).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)


def test_a_package_that_reads_them_and_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prequantized.NEEDS_PACKAGE, "compressed-tensors", ("uncompressed_tensors", "raytune-llm[quantized]"))
    say(folder, quant_method="compressed-tensors")
    with pytest.raises(ConfigError, match=r"needs uncompressed_tensors to be read.* pip install 'raytune-llm\[quantized\]'"):
        load_config(str(folder), {})


@pytest.mark.parametrize("method", ["eetq", "torchao", "fbgemm_fp8", "quanto"])
def test_what_can_not_be_trained_on_is_refused_by_name_before_anything_is_loaded(method: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    say(folder, quant_method=method, bits=4)
    with pytest.raises(ConfigError, match=rf"model\.path must have weights .* by {method}, which can't be"):
        load_config(str(folder), {})

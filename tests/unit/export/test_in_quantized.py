"""Adapters merged into what quantization left of a base, where `export.into_quantized` asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.models.load import load_config as config_of
from raytune_llm.models.load import load_model
from tests.quantized_files import GROUP, SIZES, aqlm, awq, gptq, hqq, int8, replaced, saved
from tests.runs import tiny_run

LAYER = "model.layers.1.mlp.down_proj"
IDS = torch.arange(40).remainder(256)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=258, initializer_range=0.15, dtype="bfloat16",
        tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return lora_on(AutoModelForCausalLM.from_pretrained(base), base.parent / "adapter")


def lora_on(model: Any, folder: Path) -> Path:
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(str(folder))
    return folder


def exported(base: Path, place: Path, *settings: str):
    return api.export(load_config("export", [f"model.path={base}", f"export.output_dir={place}", *settings]))


@pytest.mark.parametrize("format", ["fp8", "w8a8", "w4a16", "nf4"])
def test_a_base_in_few_bits_is_unpacked_and_merged_into_where_it_is_asked_for(base, adapter, tmp_path, format):
    exported(base, tmp_path / "few", f"export.format={format}", "export.check=false")
    merge = [f"export.adapters={{a: '{adapter}'}}", "export.dtype=fp32", "export.check_rows=2"]
    with pytest.raises(ConfigError, match=r"model\.path must not be quantized.*set export\.into_quantized=true"):
        exported(tmp_path / "few", tmp_path / "out", *merge)
    done = exported(tmp_path / "few", tmp_path / "out", *merge, "export.into_quantized=true")
    assert done.difference is not None and done.difference.max_abs < 1e-4
    few: Any = config_of(str(tmp_path / "few"), {})
    options: Any = {"weights": "pretrained", "dtype": torch.float32, "seed": 0}
    by_transformers: Any = load_model(few, str(tmp_path / "few"), **options)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(by_transformers, str(adapter)).eval()(IDS).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
        of_originals = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()(IDS).logits
    assert (found - expected).abs().max() < 1e-4 < 1e-2 < (found - of_originals.float()).abs().max()
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "out"), "quantization_config")
    assert "include the error of that quantization" in (tmp_path / "out" / "README.md").read_text()


def test_what_was_unpacked_may_be_rounded_again_and_the_distance_is_said(base, adapter, tmp_path):
    exported(base, tmp_path / "few", "export.format=nf4", "export.check=false")
    again = [f"export.adapters={{a: '{adapter}'}}", "export.into_quantized=true", "export.format=w8a8", "export.check_rows=2"]
    done = exported(tmp_path / "few", tmp_path / "out", *again)
    assert done.difference is not None and 1e-6 < done.difference.divergence < 0.5
    assert f"{done.difference.divergence:.2e}" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"


def test_a_run_over_a_quantized_base_is_merged_into_the_original_weights_or_if_asked_into_those_that_it_trained_over(
    base, chat_rows, cache, tmp_path
):
    quantized = [
        "quantization=bnb_nf4",
        f"model.path={base}",
        "model=hub",
        "model.tokenizer=bytes",
        "train.max_steps=2",
        "optimizer.lr=1e-2",
    ]
    api.train(tiny_run(chat_rows, cache, tmp_path / "run", *quantized))
    words = [f"export.run={tmp_path / 'run'}", "export.dtype=fp32", "export.check_rows=2"]
    original = api.export(load_config("export", [*words, f"export.output_dir={tmp_path / 'original'}"]))
    asked = api.export(load_config("export", [*words, f"export.output_dir={tmp_path / 'asked'}", "export.into_quantized=true"]))
    assert original.difference is not None and original.difference.divergence < 1e-6
    assert asked.difference is not None and asked.difference.divergence > 1e-4
    assert "quantization=bnb_nf4" in (tmp_path / "asked" / "README.md").read_text()
    before = load_file(base / "model.safetensors")[f"{LAYER}.weight"]
    held = dequantize_4bit(*quantize_4bit(before.float(), quant_type="nf4", blocksize=64, compress_statistics=True))
    one, other = (load_file(tmp_path / name / "model.safetensors")[f"{LAYER}.weight"] for name in ("original", "asked"))
    assert (one - before.float() - (other - held)).abs().max() < 1e-4 * (one - other).abs().max()


FOUR_BITS = {"bits": 4, "group_size": GROUP}
WRITERS = {
    "gptq": (gptq(4), {"quant_method": "gptq", **FOUR_BITS}),
    "gptq_v2 by order of activation": (
        gptq(3, "gptq_v2", desc_act=True),
        {"quant_method": "gptq", "bits": 3, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", **FOUR_BITS, "version": "gemm"}),
    "aqlm": (aqlm, {"quant_method": "aqlm"}),
    "hqq": (hqq, {"quant_method": "hqq", "quant_config": {"nbits": 4}}),
    "bitsandbytes in 8 bits": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_any_quantizer_are_merged_into_as_what_they_stand_for(writer, tmp_path):
    pack, told = WRITERS[writer]
    few = tmp_path / "few"
    plain: Any = saved(few)
    stands_for = replaced(few, pack, **told)
    (few / "quantize_config.json").write_text(json.dumps(told))
    folder = lora_on(plain, tmp_path / "adapter")
    settings = [f"export.adapters={{a: '{folder}'}}", "export.into_quantized=true", "export.check_rows=2"]
    done = exported(few, tmp_path / "out", *settings)
    assert done.difference is not None and done.difference.max_abs < 1e-3
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in stands_for.items():
        assert torch.allclose(weights[name], weight) is not ("q_proj" in name or "down_proj" in name)
    unpacked: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES), dtype=torch.float32)
    unpacked.load_state_dict({**load_others(few, unpacked), **stands_for})
    with torch.no_grad():
        expected = PeftModel.from_pretrained(unpacked, str(folder)).eval()(IDS).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert f"from its files ({told['quant_method']}), and so include" in (tmp_path / "out" / "README.md").read_text()


def load_others(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """What the files have of the model's weights as they are."""
    return {name: weight for name, weight in load_file(folder / "model.safetensors").items() if name in model.state_dict()}


@pytest.mark.parametrize("format", ["adapter", "gguf_lora"])
def test_an_adapter_alone_of_a_base_in_few_bits_is_written_and_nothing_is_merged(format, tmp_path):
    few = tmp_path / "few"
    plain: Any = saved(few)
    replaced(few, gptq(4), quant_method="gptq", **FOUR_BITS)
    folder = lora_on(plain, tmp_path / "adapter")
    words = [f"export.adapters={{a: '{folder}'}}", f"export.format={format}", "export.check_rows=2"]
    with pytest.raises(ConfigError, match=r"export\.into_quantized must be false with export\.format=.*which merges nothing"):
        exported(few, tmp_path / "out", *words, "export.into_quantized=true")
    done = exported(few, tmp_path / "out", *words)
    assert done.difference is not None and done.difference.max_abs < 1e-3


def test_a_base_in_few_bits_is_copied_as_it_is_or_not_at_all(tmp_path):
    few = tmp_path / "few"
    saved(few)
    replaced(few, gptq(4), quant_method="gptq", **FOUR_BITS)
    with pytest.raises(ConfigError, match=r"export\.dtype must be auto for weights that are quantized already"):
        exported(few, tmp_path / "out", "export.dtype=bf16")
    exported(few, tmp_path / "out", "export.check_rows=1")
    before, after = (load_file(folder / "model.safetensors") for folder in (few, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, r"export\.into_quantized is for a base whose files are quantized"),
        ({"quant_method": "mxfp4"}, r"model\.path must hold weights by gptq, .*; these are by mxfp4"),
        ({"quant_method": "gptq", "bits": 5}, r"model\.path holds weights by gptq that can't be read here: 5 bits"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}, "2 groups of layers"),
        (
            {"quant_method": "gptq", "bits": 4},
            "must have files whose layers can be unpacked one by one",
        ),
    ],
)
def test_what_cannot_be_unpacked_is_named_before_anything_is_written(base, tmp_path, given, said):
    place = tmp_path / "base"
    place.mkdir()
    for file in base.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    if given is not None:
        values = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**values, "quantization_config": given}))
        weights = load_file(place / "model.safetensors")
        save_file({name: w for name, w in weights.items() if "layers.0.mlp" not in name}, place / "model.safetensors")
    with pytest.raises(ConfigError, match=said):
        exported(place, tmp_path / "out", "export.into_quantized=true")
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_refused_before_its_training_and_before_its_weights_are_fetched(chat_rows, tmp_path):
    base, words = tmp_path / "base", f"export.output_dir={tmp_path / 'out'}"
    Qwen3MoeConfig(hidden_size=32, num_hidden_layers=1, num_experts=2, moe_intermediate_size=16).save_pretrained(base)
    train = (
        f"[train, model=hub, 'model.path={base}', quantization=bnb_nf4, 'data.path={chat_rows}', 'output_dir={tmp_path / 'run'}']"
    )
    export = f"[export, 'export.run={tmp_path / 'run'}', '{words}', export.into_quantized=true]"
    with pytest.raises(ConfigError, match=r"export\.into_quantized must be false for a mixture"):
        api.chain(load_config("chain", [f"steps={{a: {train}, b: {export}}}"]))
    given = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), **given}))
    with pytest.raises(ConfigError, match=r"model\.path must have files whose layers can be unpacked one by one, which experts"):
        api.export(load_config("export", [f"model.path={base}", words, "export.into_quantized=true"]))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]

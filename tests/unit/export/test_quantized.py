"""Quantized exports, as plain transformers loads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError, ResourceError, UserError
from raytune_llm.export.rows import rows_to_calibrate, rows_to_check
from raytune_llm.export.source import source_of
from tests.limits import no_file_larger_than
from tests.llama_cpp import small_model

FORMATS = ("fp8", "w8a8", "w4a16", "nf4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "base")


def saved(folder: Path, **settings: Any) -> Path:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
            "pad_token_id": 258, "initializer_range": 0.15, "dtype": "bfloat16", **settings,
        }
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exported(base: Path, place: Path, *settings: str):
    return api.export(load_config("export", [f"model.path={base}", f"export.output_dir={place}", "export.max_kl=9", *settings]))


def perplexity_of(folder: Path) -> float:
    """Of the rows that an export is checked on, by the loss of a model that transformers loaded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = np.random.default_rng(0)
    rows = [torch.from_numpy(draw.integers(0, model.config.vocab_size, 128))[None] for _ in range(8)]
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for ids in rows]  # rows have one length
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("format", FORMATS)
def test_plain_transformers_has_the_perplexity_that_the_card_says(base, tmp_path, format):
    adapter = LoraConfig(r=4, lora_alpha=128, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(str(tmp_path / "adapter"))
    done = exported(base, tmp_path / "out", f"export.format={format}", f"export.adapters={{a: '{tmp_path / 'adapter'}'}}")
    said = json.loads((tmp_path / "out" / "export.json").read_text())["difference"]
    assert done.difference is not None and done.difference.perplexity == said["perplexity"]
    assert math.isclose(perplexity_of(tmp_path / "out"), said["perplexity"], rel_tol=1e-5)
    assert 1e-5 < said["divergence"] < 0.5  # rounded
    assert abs(math.log(perplexity_of(base) / said["perplexity_before"])) > 0.01  # the adapter is in it
    files = load_file(tmp_path / "out" / "model.safetensors")
    stored = sum(tensor.nbytes for name, tensor in files.items() if "layers" in name)
    before = sum(tensor.nbytes for name, tensor in load_file(base / "model.safetensors").items() if "layers" in name)
    assert stored < 0.75 * before  # of matrices so small, scales and facts are a large part


@pytest.mark.parametrize("format", ["fp8", "w8a8", "w4a16"])
def test_weights_are_what_rounding_by_the_stored_scales_gives(base, tmp_path, format):
    exported(base, tmp_path / "out", f"export.format={format}", "export.check=false")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    files, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    with torch.no_grad():
        model(torch.arange(5)[None])  # they are unpacked at the first use
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        scale = files[f"{name}.weight_scale"].float()
        weight = before[f"{name}.weight"].float()
        wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
        found = model.get_submodule(name).weight
        if format == "fp8":
            expected = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn).float() * wide
        else:
            top = 127 if format == "w8a8" else 7
            expected = (weight / wide).round().clamp(-top - 1, top) * wide
        assert torch.allclose(found, expected, atol=1e-6)


def test_merged_weights_are_rounded_once(base, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(str(tmp_path / "adapter"))
    words = [f"export.adapters={{a: '{tmp_path / 'adapter'}'}}", "export.check=false"]
    exported(base, tmp_path / "merged", *words, "export.dtype=fp32")
    exported(base, tmp_path / "rounded", *words, "export.format=w8a8", "export.dtype=bf16")
    name = "model.layers.1.mlp.down_proj"
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    files = load_file(tmp_path / "rounded" / "model.safetensors")
    expected = (merged / files[f"{name}.weight_scale"].float()).round().clamp(-128, 127)
    assert torch.equal(files[f"{name}.weight"].float(), expected)


def test_shards_and_a_dtype_are_kept_by_quantized_files(base, tmp_path):
    exported(base, tmp_path / "out", "export.format=w4a16", "export.shard_size=40KB", "export.dtype=fp32", "export.group_size=16")
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 2 and tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 128 // 16)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["export.format=w4a16", "export.group_size=24"],
            r"export\.group_size must divide the widths of all matrices \(64, 128\)",
        ),
        (["export.format=fp8", "export.dtype=q8_0"], r"export\.dtype must be auto or one of"),
        (["export.format=fp8", "export.group_size=32"], r"export\.group_size is for"),
    ],
)
def test_settings_that_do_not_fit_are_refused(base, tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        exported(base, tmp_path / "out", *settings)
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_quantized_already_is_refused(base, tmp_path):
    exported(base, tmp_path / "quantized", "export.format=fp8", "export.check=false")
    with pytest.raises(ConfigError, match="for weights that are quantized already"):
        exported(tmp_path / "quantized", tmp_path / "out", "export.format=nf4")
    assert not (tmp_path / "out").exists()


def test_architectures_that_have_other_layers_are_refused(base, tmp_path):
    mixture = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(mixture).save_pretrained(tmp_path / "mixture")
    byte_tokenizer().save_pretrained(tmp_path / "mixture")
    with pytest.raises(ConfigError, match="can't be w8a8 for a mixture of experts"):
        exported(tmp_path / "mixture", tmp_path / "out", "export.format=w8a8")
    odd = saved(tmp_path / "odd", hidden_size=24, intermediate_size=40)
    with pytest.raises(ConfigError, match=r"none of 128, 64, 32 divides the widths of all matrices \(24, 40\)"):
        exported(odd, tmp_path / "out", "export.format=w4a16")
    with pytest.raises(ConfigError, match=r"blocks of 64 must fill the rows .* has 24 columns"):
        exported(odd, tmp_path / "out", "export.format=nf4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "format"), [("compressed_tensors", "fp8"), ("bitsandbytes", "nf4")])
def test_a_missing_package_is_named_before_anything_is_written(base, tmp_path, monkeypatch, package, format):
    known = "raytune_llm.export.quantized.codec.find_spec"
    monkeypatch.setattr(known, lambda name: None if name == package else pytest.fail(f"asked for {name}"))
    with pytest.raises(ConfigError, match=rf"can't be {format} here: {package} is not installed.*pip install"):
        exported(base, tmp_path / "out", f"export.format={format}")
    assert not any(tmp_path.iterdir())


QUANTIZER = Path(".quantizer/bin/python").absolute()
"""Of an environment with llmcompressor: python -m venv .quantizer && .quantizer/bin/pip install 'llmcompressor>=0.14,<0.15'."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "texts.jsonl"
    lines = [json.dumps({"text": f"Row {number} says " + "over and again " * (number % 5 + 4)}) for number in range(24)]
    file.write_text("\n".join(lines))
    return file


def of_texts(texts: Path, tmp_path: Path) -> list[str]:
    return ["data=text", f"data.path={texts}", f"data.cache={tmp_path / 'cache'}"]


@pytest.mark.skipif(not QUANTIZER.exists(), reason="needs llmcompressor in .quantizer")
def test_gptq_is_nearer_than_rounding_on_rows_like_those_it_was_calibrated_on(base, texts, tmp_path):
    words = ["export.calibration_tokens=64", "export.group_size=32", *of_texts(texts, tmp_path)]
    done = exported(base, tmp_path / "out", "export.format=gptq", f"export.python={QUANTIZER}", *words)
    rounded = exported(base, tmp_path / "rounded", "export.format=w4a16", *words)
    assert done.difference is not None and rounded.difference is not None
    assert done.difference.divergence < 0.7 * rounded.difference.divergence
    assert "8 held-out rows of" in done.difference.rows
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"calibrated on 16 rows of {texts}" in card and f"{done.difference.perplexity:.4f}" in card
    before = json.loads((tmp_path / "rounded" / "config.json").read_text())["quantization_config"]["config_groups"]
    after = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert after["group_0"]["weights"]["group_size"] == before["group_0"]["weights"]["group_size"] == 32
    assert not [file for file in (tmp_path / "out").iterdir() if file.is_dir()]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["export.format=gptq"], r"can't be gptq here: llmcompressor is not installed.*python -m venv.*export\.python="),
        (["export.format=gptq", "export.python=/nothing/there"], r"export\.python must be a Python that can be started"),
        (["export.format=gptq", "export.python=/bin/false"], r"export\.python must be the Python .* with llmcompressor"),
        (["export.format=gptq", "export.python=/bin/true"], r"data\.path must name rows to calibrate with: there is no run"),
        (["export.format=gptq", "export.python=/bin/true", "data.path=/nothing/there"], r"data\.path"),
        (["export.format=w4a16", "export.python=/bin/true"], r"export\.python is for export\.format=gptq or awq"),
        (["export.format=w4a16", "resources=local"], r"resources must be inline but for export\.format=hf, gptq or awq"),
        (["data.path=rows.jsonl", "data.eval_fraction=0.1"], r"data\.eval_fraction is for training"),
    ],
)
def test_what_calibration_lacks_is_said_before_anything_is_written(base, tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        exported(base, tmp_path / "out", *settings)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be had with a GPU")
def test_awq_without_a_gpu_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"can't be awq here: .* needs a GPU"):
        exported(base, tmp_path / "out", "export.format=awq", "export.python=/bin/true")
    assert not any(tmp_path.iterdir())


def test_a_quantizer_that_fails_leaves_nothing(base, texts, tmp_path):
    """Of /bin/true's kind, but it fails when it is to work."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *JOB*|*llmcompressor_job*) echo "no such layer" >&2; exit 3;; esac\n')
    python.chmod(0o755)
    with pytest.raises(ResourceError, match=r"llmcompressor failed: no such layer"):
        exported(base, tmp_path / "out", "export.format=gptq", f"export.python={python}", *of_texts(texts, tmp_path))
    assert sorted(place.name for place in tmp_path.iterdir()) == ["cache", "python"]


def test_an_export_whose_rows_have_changed_is_not_kept(base, texts, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(texts.read_text())
    words = ["export.format=w4a16", "export.check_rows=1", *of_texts(rows, tmp_path)]
    assert [exported(base, tmp_path / "out", *words).found for _ in range(2)] == [False, True]
    rows.write_text(texts.read_text().replace("over", "under"))
    with pytest.raises(ConfigError, match=r"export\.output_dir must be empty or new"):
        exported(base, tmp_path / "out", *words)


def test_rows_that_are_checked_are_not_calibrated_with(base, texts, tmp_path):
    run = load_config(
        "export",
        [f"model.path={base}", f"export.output_dir={tmp_path / 'out'}", "export.format=w4a16", *of_texts(texts, tmp_path)],
    )
    source = source_of(run)
    checked = rows_to_check(source, run.data, 8)
    calibrated = rows_to_calibrate(source, run.data, 8, 256, 512)
    assert (len(checked.ids), len(calibrated.ids)) == (8, 16)
    assert not {row[:9].tobytes() for row in checked.ids} & {row[:9].tobytes() for row in calibrated.ids}


@pytest.mark.parametrize("format", ["hf", "gguf", "fp8", "nf4"])
def test_a_disk_that_fills_up_leaves_what_was_there(base, tmp_path, format):
    model = small_model(tmp_path / "base", "llama") if format == "gguf" else base
    place = tmp_path / "exported" / "out"
    place.mkdir(parents=True)
    (place / "export.json").write_text("from before")
    said = r"out can't be written: .*export\.output_dir on a larger disk; nothing was left"
    with no_file_larger_than(60_000), pytest.raises(ResourceError, match=said):
        exported(model, place, f"export.format={format}", "export.overwrite=true")
    assert [(file.name, file.read_text()) for file in place.iterdir()] == [("export.json", "from before")]
    assert [folder.name for folder in place.parent.iterdir()] == ["out"]

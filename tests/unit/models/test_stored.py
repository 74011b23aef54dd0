"""Weights that stay in their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from raytune_llm.models.load import files_to_read, load_config, load_model
from raytune_llm.models.stored import Stored


@pytest.fixture(params=[(False, "50GB"), (True, "50GB"), (False, "30KB")], ids=["one file", "tied", "several files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    tied, shard = request.param
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=tied), dtype=torch.bfloat16)
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard == "50GB" else 2)
    return str(tmp_path)


def config_of(folder: str) -> PretrainedConfig:
    return load_config(folder, {})


def test_a_model_in_its_files_is_the_loaded_one(folder: str) -> None:
    settings = {"weights": "pretrained", "dtype": torch.float32, "seed": 0}
    loaded = load_model(config_of(folder), folder, **settings)
    stored = load_model(config_of(folder), folder, files=files_to_read(config_of(folder), folder), **settings)
    ours, theirs = dict(stored.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert isinstance(weight, Stored) and weight.untyped_storage().nbytes() == weight.element_size()
        assert (weight.shape, weight.dtype, weight.requires_grad) == (theirs[name].shape, torch.float32, True)
        assert torch.equal(torch.cat([weight.rows(0, 5), weight.rows(5, len(weight))]).float(), theirs[name])
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in stored.named_buffers())
    assert stored.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert stored.training == loaded.training


@pytest.mark.parametrize("change", ["lacks one", "another size", "no safetensors"])
def test_weights_that_are_not_the_models_own_are_not_read_by_rows(change: str, folder: str) -> None:
    file = sorted(Path(folder).glob("*.safetensors"))[0]
    weights = load_file(file)
    name = next(name for name in weights if "layers.0" in name or "embed" in name)
    if change == "no safetensors":
        for found in Path(folder).glob("*.safetensors*"):
            found.unlink()
    else:
        kept = weights.pop(name)
        save_file(weights if change == "lacks one" else weights | {name: kept[1:].clone()}, file)
    assert files_to_read(config_of(folder), folder) is None


def test_a_score_head_that_is_in_no_file_is_not_read(folder: str) -> None:
    assert files_to_read(config_of(folder), folder, scores=True) is None

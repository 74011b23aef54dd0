"""Models from folders: what does not go together is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from raytune_llm.errors import ConfigError
from raytune_llm.models.load import load_config, load_model
from tests.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama().base.save_pretrained(path)
    return path


def test_a_folder_gives_the_weights_that_were_saved(folder: Path) -> None:
    config = load_config(str(folder), {})
    model = load_model(config, str(folder), weights="pretrained", dtype=torch.float32, seed=1)
    saved = tiny_llama().base.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_a_config_of_other_sizes_than_the_weights_is_a_mistake_in_the_config(folder: Path) -> None:
    config = load_config(str(folder), {"hidden_size": 16})
    with pytest.raises(ConfigError, match=r"model\.config must keep the shapes of the weights .* \[97, 32\] there, \[97, 16\]"):
        load_model(config, str(folder), weights="pretrained", dtype=torch.float32, seed=1)


def test_weights_that_are_not_there_are_named(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = load_file(cut / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    config = load_config(str(cut), {})
    for scores in (False, True):
        with pytest.raises(
            ConfigError, match=r"must have all weights .* 1 are missing, such as model\.layers\.1\.mlp\.up_proj\.weight"
        ):
            load_model(config, str(cut), weights="pretrained", dtype=torch.float32, seed=1, scores=scores)


def test_a_language_model_gets_a_new_score_head_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.enable_propagation()
    try:
        model = load_model(
            load_config(str(folder), {}), str(folder), weights="pretrained", dtype=torch.float32, seed=1, scores=True
        )
    finally:
        transformers.logging.disable_propagation()
    assert model.get_parameter("score.weight").shape == (1, 32)
    assert not caplog.messages


@pytest.mark.parametrize("key", ["num_hidden_layers", "max_window_layers"])
def test_a_model_of_endless_layers_is_refused_at_once(folder: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.config\.{key} must be at most"):
        load_config(str(folder), {key: 10**10})

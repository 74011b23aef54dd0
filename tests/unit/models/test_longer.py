"""Positions beyond a model's own, by the ways of scaling that transformers has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm import api, load_config
from raytune_llm.errors import ConfigError
from raytune_llm.models.load import load_config as model_config
from raytune_llm.models.longer import with_positions
from tests.models import saved_llama
from tests.runs import tiny_run

KINDS = ("linear", "dynamic", "yarn", "llama3")


def config(**changes: object):
    return AutoConfig.for_model("llama", **{"max_position_embeddings": 64, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_is_the_smallest_whole_one_that_suffices(kind):
    longer = with_positions(config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), 129, kind)
    assert longer.max_position_embeddings == 192
    assert longer.rope_parameters["factor"] == 3.0 and longer.rope_parameters["rope_type"] == kind
    assert longer.rope_parameters["rope_theta"] == 5e5
    assert longer.rope_parameters.get("original_max_position_embeddings") == (None if kind == "linear" else 64)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_frequencies_are_those_that_transformers_computes_for_such_a_config(kind):
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 16}
    longer = with_positions(config(**small), 128, kind)
    by_hand = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    by_hand |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    if kind == "linear":
        del by_hand["original_max_position_embeddings"]
    expected = AutoConfig.for_model("llama", max_position_embeddings=128, rope_parameters=by_hand, **small)
    found, wanted, unscaled = (
        AutoModelForCausalLM.from_config(one).model.rotary_emb.inv_freq for one in (longer, expected, config(**small))
    )
    assert torch.equal(found, wanted) and not torch.equal(found, unscaled)


def test_a_model_with_enough_positions_stays_as_it_is():
    assert with_positions(before := config(), 64, "yarn") is before


def test_a_scaling_gives_way_to_another_from_the_original_positions():
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    scaled = config(rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0})
    longer = with_positions(scaled, 100, "linear")
    assert longer.rope_parameters == {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    assert longer.max_position_embeddings == 128


def test_a_scaling_of_the_same_kind_keeps_its_other_parameters():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    own = {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.7, "truncate": False}
    longer = with_positions(config(rope_parameters=rope | own | {"attention_factor": 1.3}), 100, "yarn")
    assert longer.rope_parameters == rope | own | {"factor": 4.0}
    by_bands = rope | {"rope_type": "llama3", "low_freq_factor": 2.0, "high_freq_factor": 8.0}
    assert with_positions(config(rope_parameters=by_bands), 100, "llama3").rope_parameters == by_bands | {"factor": 4.0}
    assert "beta_fast" not in with_positions(config(rope_parameters=rope | own), 100, "dynamic").rope_parameters


def test_a_linear_scaling_is_multiplied_and_gives_way_to_no_other():
    """Of deepseek-coder, whose 16,384 positions are 4,096 stretched by 4."""
    scaled = config(rope_parameters={"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0})
    longer = with_positions(scaled, 100, "linear")
    assert longer.rope_parameters == {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0}
    assert longer.max_position_embeddings == 128
    with pytest.raises(ConfigError, match=r"model\.rope_scaling must be linear for a model .* already, by 4, got 'yarn'"):
        with_positions(scaled, 100, "yarn")


def test_a_linear_scaling_that_tells_its_original_positions_is_scaled_from_these():
    rope = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 16}
    longer = with_positions(config(rope_parameters=rope), 100, "linear")
    assert longer.rope_parameters == rope | {"factor": 7.0}
    assert longer.max_position_embeddings == 112
    other = with_positions(config(rope_parameters=rope), 100, "yarn")
    assert other.rope_parameters == rope | {"rope_type": "yarn", "factor": 7.0}


def test_the_text_model_of_several_media_is_what_is_scaled():
    text = {"max_position_embeddings": 64}
    longer = with_positions(AutoConfig.for_model("qwen2_vl", text_config=text), 100, "yarn")
    assert longer.get_text_config().max_position_embeddings == 128
    assert longer.get_text_config().rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_models_without_one_base_of_rotary_frequencies_are_refused(kind):
    with pytest.raises(ConfigError, match=r"model.positions can't be more than"):
        with_positions(AutoConfig.for_model(kind), 10**6, "yarn")


@pytest.mark.parametrize("given", ["positions=64", "rope_scaling=yarn"])
def test_one_is_not_given_without_the_other(given):
    with pytest.raises(ConfigError, match=r"must be given with model\."):
        load_config("train", ["data.path=x", "model=tiny_random", f"model.{given}"])


def test_a_run_is_as_long_as_asked_and_its_model_is_read_so_elsewhere(chat_rows, tmp_path):
    path = saved_llama(tmp_path / "base", max_position_embeddings=32)
    settings = ["model=hub", f"model.path={path}", "train.max_steps=1", "data.eval_fraction=0", "adapter.rank=4"]
    with pytest.raises(ConfigError, match=r"Lower it, or set model.positions and model.rope_scaling"):
        api.train(tiny_run(chat_rows, str(tmp_path / "cache"), tmp_path / "no", *settings))
    longer = ["model.positions=256", "model.rope_scaling=yarn"]
    result = api.train(tiny_run(chat_rows, str(tmp_path / "cache"), tmp_path / "run", *settings, *longer))
    saved = json.loads(Path(result.final, "config.json").read_text())
    assert saved["max_position_embeddings"] == 256 and saved["rope_parameters"]["rope_type"] == "yarn"
    read = model_config(str(path), {}, positions=256, rope_scaling="yarn")
    assert read.rope_parameters == saved["rope_parameters"]

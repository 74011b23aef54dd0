"""What a run says of its model, and which models it does not take."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.config.adapter import NoAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.models.build import build_policy, run_config
from raytune_llm.models.load import load_config
from tests.models import model_section

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 300}


def random_model(**config: object) -> ModelConfig:
    return model_section(
        path=None,
        revision=None,
        weights="random",
        config=config,
        tokenizer=None,
        trust_remote_code=False,
        attention="auto",
    )


@pytest.mark.parametrize(
    ("of_model", "said"), [({}, "; without the model's attention dropout of 0.1"), ({"attn_pdrop": 0.0}, "")]
)
def test_dropout_of_attention_that_a_model_comes_with_is_said_to_be_left_out(of_model, said):
    model = random_model(**GPT2, **of_model)
    config = load_config(None, model.config)
    cpu = torch.device("cpu")
    _, choice = build_policy(config, model, NoAdapter(name="none"), compute=torch.float32, seed=0, device=cpu)
    assert choice == f"attention: varlen (one document after another, on the CPU{said})"


def test_dropout_of_attention_that_a_user_asks_for_is_refused():
    with pytest.raises(ConfigError, match=r"model.config.attn_pdrop must be 0, .* got 0.2\. Leave it out"):
        run_config(random_model(**GPT2, attn_pdrop=0.2), tokenizer=None, max_length=16)


def test_a_model_with_more_than_a_head_over_its_hidden_states_is_refused():
    model = random_model(model_type="modernbert-decoder", hidden_size=32, intermediate_size=32, num_attention_heads=2)
    config = load_config(None, model.config | {"num_hidden_layers": 1, "vocab_size": 300, "pad_token_id": 0})
    with pytest.raises(ConfigError, match=r"only a head .*; modernbert-decoder has lm_head"):
        build_policy(config, model, NoAdapter(name="none"), compute=torch.float32, seed=0, device=torch.device("cpu"))


def test_a_model_whose_packed_rows_would_see_each_other_is_refused_before_it_is_loaded():
    with pytest.raises(ConfigError, match=r"model.path must be a model .*, which zamba2 does not"):
        run_config(random_model(model_type="zamba2"), byte_tokenizer(), max_length=16)
    with pytest.raises(ConfigError, match=r"data.packing must be false for mamba, .* Set data.packing=false"):
        run_config(random_model(model_type="mamba"), byte_tokenizer(), max_length=16, packing=True)
    assert run_config(random_model(model_type="mamba"), byte_tokenizer(), max_length=16).model_type == "mamba"


def test_rows_for_which_longrope_would_change_the_positions_of_those_beside_them_are_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    rope["original_max_position_embeddings"] = 32
    model = random_model(model_type="phi3", **sizes, rope_parameters=rope, original_max_position_embeddings=32)
    assert run_config(model, byte_tokenizer(), max_length=32)
    with pytest.raises(ConfigError, match=r"data.max_length must be at most 32, .*LongRoPE.*, got 33\. Lower it"):
        run_config(model, byte_tokenizer(), max_length=33)


def test_rows_of_llama_4_stay_within_what_its_layers_attend_to_as_any_model():
    model = random_model(model_type="llama4_text")
    assert run_config(model, byte_tokenizer(), max_length=8191).model_type == "llama4_text"
    with pytest.raises(ConfigError, match=r"data.max_length must be at most the model's 8191 positions, got 8192\. Lower it\.$"):
        run_config(model, byte_tokenizer(), max_length=8192)

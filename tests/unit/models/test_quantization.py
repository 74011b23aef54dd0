"""Which layers are quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.errors import ConfigError
from raytune_llm.models.layers import layers
from raytune_llm.models.load import files_to_read, load_config, load_model
from raytune_llm.models.quantization import FP8Linear, described, linears_but, quantize, replace
from raytune_llm.models.stored import bring
from tests.models import tiny_llama


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
    assert described(layers(stored), "fp8") == "fp8 for 8 linear layers, not for k_proj, q_proj, v_proj"
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (stored, loaded))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (type(ours[name]), ours[name].dtype) == (type(tensor), tensor.dtype)
        assert torch.equal(ours[name].float(), tensor.float())


def test_models_with_nothing_to_quantize_are_refused() -> None:
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=97))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 97}
    mixtral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", num_key_value_heads=2, **sizes))
    for model, said in ((gpt2, "finds no linear layer"), (mixtral, "can't be had of a mixture of experts")):
        with pytest.raises(ConfigError, match=f"quantization {said}"):
            quantize(layers(model.requires_grad_(False)), "bnb_nf4", torch.device("cuda"))

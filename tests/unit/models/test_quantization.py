"""Which layers are quantized."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from raytune_llm.errors import ConfigError
from raytune_llm.models.layers import layers
from raytune_llm.models.quantization import linears_but
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
    with pytest.raises(ConfigError, match=r"quantization\.wide must name linear layers .* down_proj, gate_proj"):
        linears_but(layers(tiny_llama().model), ["query"])

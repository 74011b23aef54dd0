"""Which of a model's own weights are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters import adapt

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(20).view(2, 10)


def base(family: str = "llama", num_layers: int = 4, **sizes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": num_layers, **sizes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, tie_word_embeddings=False, **sizes)).eval()


def trained(*overrides: str, model: Any = None) -> set[str]:
    """The modules with trained weights, layers by their numbers."""
    section = load_config("train", ["data.path=x", *overrides]).adapter
    adapted = adapt(model or base(), section).model
    names = {name.rpartition(".")[0] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    return {name.removeprefix("model.layers.").removeprefix("model.") for name in names}


def layers_of(names: set[str]) -> set[int]:
    return {int(name.partition(".")[0]) for name in names if name[0].isdigit()}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {2, 3}),
        (["adapter.last_layers=1"], {3}),
        (["adapter.last_layers=null", "adapter.first_layers=3"], {0, 1, 2}),
        (["adapter.last_layers=null", "adapter.layers=[0,-1]"], {0, 3}),
    ],
)
def test_the_layers_that_are_named_are_trained_and_no_others(overrides: list[str], expected: set[int]) -> None:
    assert layers_of(trained("adapter=freeze", *overrides)) == expected


def test_modules_of_the_layers_and_modules_beside_them_are_trained_by_name() -> None:
    names = trained("adapter=freeze", "adapter.last_layers=1", "adapter.modules=[mlp]", "adapter.extra_modules=[norm,lm_head]")
    assert names == {"3.mlp.gate_proj", "3.mlp.up_proj", "3.mlp.down_proj", "norm", "lm_head"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.last_layers=5"], r"adapter\.last_layers must be at most the model's 4 layers, got 5"),
        (["adapter.first_layers=1"], r"adapter must be one of adapter\.first_layers, .* got .*'last_layers': 2"),
        (["adapter.last_layers=null"], r"adapter must be one of"),
        (
            ["adapter.last_layers=null", "adapter.layers=[4]"],
            r"adapter\.layers must be numbers of the model's 4 .* got \[4\]",
        ),
        (["adapter.modules=[ffn]"], r"adapter\.modules must name modules of the model's layers, got \['ffn'\]. It has .*mlp"),
        (
            ["adapter.extra_modules=[head]"],
            r"adapter\.extra_modules must name .* It has embed_tokens, lm_head, norm",
        ),
    ],
)
def test_layers_and_modules_that_the_model_lacks_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trained("adapter=freeze", *overrides)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_new_layers_pass_on_what_comes_and_alone_are_trained(family: str) -> None:
    model = base(family, head_dim=8)
    before, layer_types = model(IDS).logits, getattr(model.config, "layer_types", None)
    assert layers_of(trained("adapter=llama_pro", model=model)) == {2, 5}
    assert torch.equal(model(IDS).logits, before)
    assert model.config.num_hidden_layers == 6 and len(model.model.layers) == 6
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    if layer_types is not None:
        first, second, third, fourth = layer_types
        assert model.config.layer_types == [first, second, second, third, fourth, fourth]
    cached = model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    ("model", "overrides", "said"),
    [
        (base(), ["adapter.new_layers=3"], r"adapter\.new_layers must divide the model's 4 layers, got 3. Set one of 1, 2, 4"),
        (
            base("phi"),
            [],
            r"adapter can be llama_pro only for layers with self_attn.o_proj .* phi don't have",
        ),
    ],
)
def test_models_that_can_not_be_lengthened_are_refused(model: Any, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trained("adapter=llama_pro", *overrides, model=model)

"""Which layers an adapter is on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raytune_llm.config.adapter import LoRA
from raytune_llm.losses.tokens import token_logprobs
from raytune_llm.memory.flops import operations
from raytune_llm.models import attention
from raytune_llm.models.adapters import adapt
from raytune_llm.models.causal_lm import CausalLM
from tests.models import packed, some_rows

IDS = torch.arange(20).view(2, 10)


def tiny(num_layers: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=num_layers, **sizes))


def lora(last_layers: int | None) -> LoRA:
    return LoRA(name="lora", rank=4, alpha=8.0, dropout=0.0, targets="all-linear", last_layers=last_layers, path=None)


def trained_layers(model: torch.nn.Module) -> set[int]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {int(name.partition(".layers.")[2].partition(".")[0]) for name in names}


@pytest.mark.parametrize("last_layers", [None, 3, 15])
def test_every_layer_gets_an_adapter_unless_fewer_are_asked_for(last_layers: int | None) -> None:
    assert trained_layers(adapt(tiny(), lora(last_layers))) == {0, 1, 2}


def test_the_last_layers_alone_learn_and_peft_loads_what_they_learned(tmp_path: Path) -> None:
    model = adapt(tiny(), lora(1))
    assert trained_layers(model) == {2}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_layers_below_the_first_adapter_take_no_gradients() -> None:
    """2 operations a weight in place of 4: forward alone. Embeddings are tied to no head here."""
    whole, last = (tiny() for _ in range(2))
    layer = sum(p.numel() for p in tiny().model.layers[0].parameters() if p.ndim == 2)
    all_layers, last_layer = (operations(CausalLM(adapt(model, lora(n))), model.config) for model, n in ((whole, 3), (last, 1)))
    adapters = sum(p.numel() for n, p in whole.named_parameters() if "lora" in n and ".layers.2." not in n)
    assert all_layers.per_token - last_layer.per_token == 2 * (2 * layer) + 6 * adapters
    assert last_layer.per_pair / all_layers.per_pair == (1 + 1 + 3) / 9


def test_of_experts_those_that_a_token_visits_are_counted() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = AutoConfig.for_model("mixtral", num_local_experts=6, num_experts_per_tok=2, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    others = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.get_input_embeddings().weight.numel()
    assert operations(CausalLM(model), config).per_token == 6 * (experts / 3 + others)


@pytest.mark.parametrize("last_layers", [1, 2, 3])
def test_the_backward_pass_ends_at_the_first_adapter(last_layers: int) -> None:
    model = tiny()
    policy, reached = CausalLM(adapt(model, lora(last_layers))), []
    attention.attach(model, "varlen")
    for number, layer in enumerate(model.model.layers):
        layer.register_full_backward_pre_hook(lambda *_, number=number: reached.append(number))
    values = policy(packed(some_rows([8, 12])), token_logprobs)
    values.sum().backward()
    assert sorted(reached) == list(range(3 - last_layers, 3))

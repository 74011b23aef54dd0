"""Adapters in groups say what PEFT's own layers say, and learn what they learn."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.models.adapters.grouped import GroupedAttention, GroupedMLP, described, gated_mlp, group, lacks_for_gated

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IDS = torch.arange(20).view(2, 10)


def adapted(family: str, dropout: float = 0.0, rank: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def logits_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(IDS).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_grouped_adapters_equal_those_of_peft(family: str) -> None:
    model = adapted(family)
    logits, gradients = logits_and_gradients(model)
    grouped, grouped_gradients = logits_and_gradients(group(model))
    assert any(isinstance(module, GroupedMLP) for module in model.modules())
    torch.testing.assert_close(grouped, logits)
    assert gradients.keys() == grouped_gradients.keys()
    for name in gradients:
        torch.testing.assert_close(grouped_gradients[name], gradients[name])


def test_a_gated_mlp_as_one_operation_equals_that_of_peft() -> None:
    """What runs on GPUs, with the arithmetic of its kernels spelled out."""
    model = adapted("llama").double()
    mlp = model.get_base_model().model.layers[0].mlp
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    assert lacks_for_gated(*layers, mlp.act_fn) is None
    x = torch.randn(2, 10, SIZES["hidden_size"], dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    upstream = torch.randn_like(x)
    plain, fused = mlp(x), gated_mlp(x, *layers)
    torch.testing.assert_close(fused, plain)
    for mine, theirs in zip(
        torch.autograd.grad(fused, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("dropout", "rank", "said"),
    [
        (0.1, 4, "adapter.dropout"),
        (0.0, 65, "a rank above 64"),
    ],
)
def test_an_mlp_that_is_not_one_operation_on_a_gpu_is_told_of(dropout: float, rank: int, said: str) -> None:
    model = group(adapted("llama", dropout, rank))
    assert described(model, "cuda") == f"projections of one input together, a gated MLP not as one operation ({said})"


def test_an_mlp_of_another_activation_is_not_one_operation() -> None:
    mlp = adapted("gemma").get_base_model().model.layers[0].mlp
    assert lacks_for_gated(mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn) == "another activation than SiLU"


def test_an_adapter_switched_off_leaves_the_base_model() -> None:
    model = group(adapted("llama"))
    base = group(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)))
    base.load_state_dict(
        {name.replace(".base_layer", ""): p for name, p in model.get_base_model().state_dict().items() if "lora_" not in name}
    )
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits)


def test_names_of_parameters_stay() -> None:
    model = adapted("llama")
    names = [name for name, _ in model.named_parameters()]
    assert sorted(name for name, _ in group(model).named_parameters()) == sorted(names)
    assert any(isinstance(module, GroupedAttention) for module in model.modules())


def test_generation_with_a_cache_goes_on_as_without() -> None:
    model = group(adapted("llama")).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, use_cache=True, **settings), model.generate(IDS, use_cache=False, **settings))


def test_dropout_is_at_work_while_training_only() -> None:
    model = group(adapted("llama", dropout=0.5))
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)


def test_compiled_layers_write_the_low_rank_product_out_and_say_the_same() -> None:
    torch._dynamo.reset()
    model = group(adapted("llama"))
    logits, gradients = logits_and_gradients(model)
    for layer in model.get_base_model().model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    compiled, compiled_gradients = logits_and_gradients(model)
    torch.testing.assert_close(compiled, logits)
    for name in gradients:
        torch.testing.assert_close(compiled_gradients[name], gradients[name])


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", "projections of one input together"),
        ("stablelm", "a layer at a time (StableLmAttention, StableLmMLP have no grouped form here)"),
    ],
)
def test_families_without_groups_are_told_of(family: str, said: str) -> None:
    assert described(group(adapted(family)), "cuda") == said


def test_a_model_without_adapters_says_nothing_of_them() -> None:
    assert described(torch.nn.Linear(2, 2), "cpu") is None

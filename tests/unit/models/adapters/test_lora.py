"""Which layers an adapter is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raytune_llm.config.adapter import LoRA
from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import token_logprobs
from raytune_llm.memory.flops import operations
from raytune_llm.models import attention
from raytune_llm.models.adapters import OWN, PeftAdapters, adapt
from raytune_llm.models.build import build_policy
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.train.optimizers import build_optimizer
from tests.models import lora_section, model_section, packed, some_rows

IDS = torch.arange(20).view(2, 10)


def tiny(num_layers: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=num_layers, **sizes))


def lora(last_layers: int | None) -> LoRA:
    return lora_section(last_layers=last_layers)


def trained_layers(model: torch.nn.Module) -> set[int]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {int(name.partition(".layers.")[2].partition(".")[0]) for name in names}


@pytest.mark.parametrize("last_layers", [None, 3, 15])
def test_every_layer_gets_an_adapter_unless_fewer_are_asked_for(last_layers: int | None) -> None:
    assert trained_layers(adapt(tiny(), lora(last_layers)).model) == {0, 1, 2}


def test_the_last_layers_alone_learn_and_peft_loads_what_they_learned(tmp_path: Path) -> None:
    model = adapt(tiny(), lora(1)).model
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
    all_layers, last_layer = (
        operations(CausalLM(adapt(model, lora(n)).model), model.config) for model, n in ((whole, 3), (last, 1))
    )
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


def test_of_packed_experts_what_they_stand_for_is_counted() -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = AutoConfig.for_model("mixtral", num_local_experts=6, num_experts_per_tok=2, num_key_value_heads=2, **sizes)
    counted = []
    for name in ("none", "bnb_nf4", "bnb_int8"):
        section = load_config("train", ["data.path=x", f"quantization={name}"]).quantization
        settings = {"compute": torch.float32, "seed": 0, "device": torch.device("cpu"), "quantization": section}
        policy, _ = build_policy(config, model_section(path=None, weights="random", config={}), lora(None), **settings)
        counted.append(operations(policy, config))
    assert counted[0] == counted[1] == counted[2]


def test_embeddings_of_positions_and_an_original_of_a_trained_copy_are_not_multiplied_with() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    multiplied = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "wpe" not in name)
    assert operations(CausalLM(model), config).per_token == 6 * multiplied  # the head is the embedding
    whole, copied = untied(), untied()
    for model, whole_modules in ((whole, []), (copied, ["lm_head"])):
        adapt(model, lora_section(modules_to_save=whole_modules))
    plain, with_head = (operations(CausalLM(one), one.config) for one in (whole, copied))
    assert plain.of_head == 4 * 97 * 32 and with_head.of_head == 6 * 97 * 32
    assert with_head.per_token - plain.per_token == 2 * 97 * 32


@pytest.mark.parametrize("last_layers", [1, 2, 3])
def test_the_backward_pass_ends_at_the_first_adapter(last_layers: int) -> None:
    model = tiny()
    policy, reached = CausalLM(adapt(model, lora(last_layers)).model), []
    attention.attach(model, "varlen")
    for number, layer in enumerate(model.model.layers):
        layer.register_full_backward_pre_hook(lambda *_, number=number: reached.append(number))
    values = policy(packed(some_rows([8, 12])), token_logprobs)
    values.sum().backward()
    assert sorted(reached) == list(range(3 - last_layers, 3))


def adapted(*overrides: str, model: Any = None) -> PeftAdapters:
    """Of random values, as if it had learned something."""
    adapters = adapt(
        model or tiny(), load_config("train", ["data.path=x", "adapter.rank=4", "adapter.alpha=8", *overrides]).adapter
    )
    torch.manual_seed(1)
    for parameter in adapters.trained(OWN).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return adapters


def ranks(adapters: PeftAdapters) -> dict[str, int]:
    found = {name: parameter for name, parameter in adapters.base.named_parameters() if ".lora_A." in name}
    return {name.partition(".lora_A")[0].removeprefix("model.layers."): len(parameter) for name, parameter in found.items()}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["adapter.targets=[q_proj]", "adapter.rank_pattern={1.self_attn.q_proj:2}"], {"0": 4, "1": 2, "2": 4}),
        (["adapter.targets='.*[02].self_attn.q_proj'"], {"0": 4, "2": 4}),
        (["adapter.targets=[q_proj]", "adapter.layers=[1,-1]"], {"1": 4, "2": 4}),
        (["adapter.targets='.*layers.[0-1](.self_attn(.q_proj)?)?'"], {"0": 4, "1": 4}),
        (["adapter.targets='.*layers.[0-1](.self_attn(.q_proj)?)?'", "adapter.layers=[1]"], {"1": 4}),
    ],
)
def test_layers_and_ranks_go_by_pattern_and_number(overrides: list[str], expected: dict[str, int], tmp_path: Path) -> None:
    adapters = adapted(*overrides)
    assert ranks(adapters) == {f"{number}.self_attn.q_proj": rank for number, rank in expected.items()}
    adapters.save(OWN, tmp_path)
    elsewhere = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    torch.testing.assert_close(elsewhere(IDS).logits, adapters.base.eval()(IDS).logits)


def test_an_expression_that_matches_more_than_layers_names_the_layers(tmp_path: Path) -> None:
    """The example of docs/adapters.md: model.layers.0.mlp and mlp.act_fn match it too."""
    adapters = adapted("adapter.targets='.*layers.[0-1].mlp.*'")
    mlp = [f"{number}.mlp.{name}" for number in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")]
    assert sorted(ranks(adapters)) == sorted(mlp)
    adapters.save(OWN, tmp_path)
    elsewhere = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    torch.testing.assert_close(elsewhere(IDS).logits, adapters.base.eval()(IDS).logits)


def test_a_name_that_other_modules_have_too_is_that_of_the_layers() -> None:
    """LFM2 calls a mixer and its convolution conv."""
    model = untied()
    model.model.layers[0].q_proj = torch.nn.Dropout(0.1)
    assert ranks(adapted("adapter.targets=[q_proj]", model=model)) == {f"{n}.self_attn.q_proj": 4 for n in range(3)}


def test_ranks_scales_embeddings_and_whole_modules_are_what_plain_peft_loads_and_merges(tmp_path: Path) -> None:
    adapters = adapted(
        "adapter.targets=[embed_tokens,q_proj,down_proj]",
        "adapter.rank_pattern={down_proj:2}",
        "adapter.alpha_pattern={'.*1.self_attn.q_proj':3.0}",
        "adapter.modules_to_save=[lm_head,norm]",
        "adapter.last_layers=2",
        model=untied(),
    )
    adapters.save(OWN, tmp_path)
    expected = adapters.base.eval()(IDS).logits
    assert (untied()(IDS).logits - expected).abs().max() > 0.1
    elsewhere: Any = PeftModel.from_pretrained(untied(), str(tmp_path)).eval()
    torch.testing.assert_close(elsewhere(IDS).logits, expected)
    torch.testing.assert_close(elsewhere.merge_and_unload()(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    continued = adapted(f"adapter.path={tmp_path}", model=untied())
    assert continued.trained(OWN).keys() == adapters.trained(OWN).keys()
    whole = [name for name in adapters.trained(OWN) if ".modules_to_save." in name]
    assert len(whole) == 2 and all("lm_head" in name or ".norm." in name for name in whole)


def untied(**changed: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", **{"num_hidden_layers": 3, "tie_word_embeddings": False, **sizes, **changed})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.targets='.*['"], r"adapter\.targets must be a list, all-linear or a regular expression, got '\.\*\['"),
        (["adapter.targets=q_proj"], r"adapter\.targets is a regular expression, and must match whole names .*, got 'q_proj'"),
        (["adapter.layers=[3]"], r"adapter\.layers must be numbers of the model's 3 layers"),
        (["adapter.layers=[1]", "adapter.last_layers=1"], r"adapter\.layers can't be combined with adapter\.last_layers"),
        (
            ["adapter.rank_pattern={q:2}"],
            r"adapter\.rank_pattern must name, each of them, layers that get an adapter, .* got \['q'\]",
        ),
        (["adapter.targets=[embed_tokens]", "adapter.rank=40"], r"adapter\.rank must be at most 32, .* embed_tokens, got 40"),
        (["adapter.targets=[lm_head]", "adapter.rank=40"], r"adapter\.rank must be at most 32, .* lm_head, got 40"),
        (
            ["adapter.rank_pattern={(q_proj: 2}"],
            r"adapter\.rank_pattern must have regular expressions as its keys: this one is invalid \(.*got '\(q_proj'",
        ),
        (["adapter.alpha_pattern={'*_proj': 2}"], r"adapter\.alpha_pattern must have regular expressions .* got '\*_proj'"),
        (["optimizer.groups={'*norm': {lr_factor: 2}}"], r"optimizer\.groups must have regular expressions .* got '\*norm'"),
        (["adapter.rank=17"], r"got 17\. Lower it, or set adapter\.rank_pattern=\{k_proj: 16\}"),
        (["adapter.rank_pattern={k_proj:17}"], r"adapter\.rank_pattern must be at most 16, the smaller side of k_proj"),
        (
            ["adapter.targets=[q_proj,lm_head]", "adapter.modules_to_save=[lm_head]"],
            r"adapter\.modules_to_save can't be, or contain, layers that adapter\.targets names: lm_head, got \['lm_head'\]",
        ),
        (["adapter.targets=[up_proj]", "adapter.modules_to_save=[mlp]"], r"adapter\.targets names: up_proj, got \['mlp'\]"),
        (["adapter.modules_to_save=[layers]"], r"adapter\.modules_to_save can't be, or contain, layers"),
        (
            ["adapter.modules_to_save=[q_proj]", "adapter.rank_pattern={q_proj: 2}"],
            r"adapter\.rank_pattern must name, each of them, layers that get an adapter, .* got \['q_proj'\]",
        ),
        (["adapter.modules_to_save=[score]"], r"adapter\.modules_to_save must name modules of the model, got \['score'\]"),
    ],
)
def test_settings_that_no_layer_answers_to_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adapted(*overrides)


def test_narrow_projections_have_no_rank_above_theirs_and_gates_may() -> None:
    wide = untied(hidden_size=512, num_attention_heads=4, num_key_value_heads=1, head_dim=32, num_hidden_layers=1)
    gate = "self_attn.gate"
    wide.model.layers[0].self_attn.gate = torch.nn.Linear(512, 4)
    assert ranks(adapted("adapter.targets=[gate]", "adapter.rank=8", model=wide)) == {f"0.{gate}": 8}
    embedding = untied(vocab_size=4096)  # a hundred times as long as wide, and no gate
    with pytest.raises(ConfigError, match=r"adapter\.rank must be at most 32, the smaller side of embed_tokens, got 1000"):
        adapted("adapter.targets=[embed_tokens]", "adapter.rank=1000", model=embedding)


def test_an_embedding_that_is_the_head_too_can_not_be_trained_whole_beside_an_adapter() -> None:
    tied = untied(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"adapter\.modules_to_save can't name an embedding that is tied to the head"):
        adapted("adapter.modules_to_save=[embed_tokens]", model=tied)


def test_b_learns_faster_than_a_under_any_optimizer() -> None:
    adapters = adapted("adapter=lora_plus", "adapter.lr_ratio=8", "adapter.targets=[q_proj,embed_tokens]")
    policy = CausalLM(adapters.model, adapters=adapters)
    names = {parameter: name for name, parameter in policy.named_parameters()}
    for optimizer in ("adamw", "sgd", "muon"):
        section = load_config("train", ["data.path=x", f"optimizer={optimizer}"]).optimizer
        built = build_optimizer(section, policy, fused=False, lr_factor=policy.adapters.lr_factor)
        factors = {names[p]: group["lr_factor"] for group in built.param_groups for p in group["params"]}
        assert {name.split(".")[-3] if "embedding" not in name else "embedding": factor for name, factor in factors.items()} == {
            "lora_A": 1.0,
            "lora_B": 8.0,
            "embedding": 1.0,
        }

"""Models of every kind: rows are computed as by themselves, in a pack and over a cache, or the model is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.config.load import load_config
from raytune_llm.data.batches import collate
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.memory.flops import operations
from raytune_llm.models import attention
from raytune_llm.models.adapters import OWN, PeftAdapters, Slots, bank_of
from raytune_llm.models.adapters.method import new_config, targeted
from raytune_llm.models.adapters.methods import METHODS
from raytune_llm.models.attention.cache import ATTENDS_TWICE, CachedRows, NewTokens, PagedCache, check_cached
from raytune_llm.models.attention.isolation import ONE_ROW_A_LINE, check_isolation, needs_lines
from raytune_llm.models.build import build_policy
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.layers import layers
from raytune_llm.models.load import check_trainable, load_model, model_class
from raytune_llm.models.multimodal import is_multimodal
from raytune_llm.models.policy import Policy
from raytune_llm.models.quantization.linears import linears_but
from raytune_llm.records import Batch
from tests.models import VOCABULARY, logits, lora_section, model_section, packed, some_rows

SIZES = (
    {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "ffn_dim": 48, "word_embed_proj_dim": 32}
    | {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "residual_dropout", "attention_dropout"), 0.0)
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "sliding_window": 4}
)
"""By the names that families have for them."""
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
ROTARY = {"rotary_dim": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
KEPT_APART_NAMES = (
    "llama mistral ministral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 olmoe "
    "cohere cohere2 granite granitemoe gpt2 gpt_bigcode gpt_neox opt starcoder2 glm glm4 glm4_moe smollm3 exaone4 ernie4_5 "
    "seed_oss hunyuan_v1_dense deepseek_v2 deepseek_v3 minicpm3 helium jetmoe nanochat persimmon apertus afmoe arcee bitnet "
    "diffllama ernie4_5_moe exaone_moe flex_olmo glm4_moe_lite granitemoeshared hunyuan_v1_moe hyperclovax internlm3 "
    "iquestcoder minimax_m2 ministral3 solar_open vaultgemma youtu gpt_oss flint granite_swa granitemoe_swa mimo_v2_flash "
    "aria_text axk1 beam cohere2_moe cohere_compass_text ctrl cwm dbrx dots1 gemma3n_text gemma4_text gemma4_unified_text "
    "gpt-sw3 hrm_text hy_v3 jais2 kolibri1 laguna longcat_flash mellum minimax_m3_vl_text moshi phimoe llama4_text"
)
KEPT_APART = KEPT_APART_NAMES.split()
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2}
PER_LAYER |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
FULL_ATTENTION = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
CHANGES = {
    "cohere_compass_text": {"rope_parameters": FULL_ATTENTION},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": PER_LAYER
    | {"laurel_rank": 4, "altup_num_inputs": 2, "intermediate_size": [48] * 4}
    | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "pad_token_id": None},  # whose row of zeros has no gradient
    "gemma4_text": PER_LAYER | {"global_head_dim": 16},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "num_layers": 2, "moe_topk": 2, "zero_expert_num": 2},
}
"""What makes a small one of some."""
REFUSED_BY_LAYERS = (
    "bert bert-generation camembert data2vec-text electra ernie modernbert-decoder roberta roberta-prelayernorm roc_bert "
    "xlm-roberta xlm-roberta-xl xmod"
)
IN_LINES = {
    "bamba": MAMBA, "bloom": {}, "codegen": ROTARY, "falcon": {}, "falcon_mamba": {},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 2.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 4},
    "gptj": ROTARY, "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 4},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "nemotron": {},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4},
    "olmo_hybrid": LINEAR, "qwen3_5_moe_text": LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 4, "num_hidden_layers": 3},
    "rwkv": {}, "stablelm": {}, "xglm": {},
}  # fmt: skip
"""Architectures that train unpacked, and the settings of a small one."""
NOT_KEPT_APART = {
    "in a way of their own": "openai-gpt bart biogpt",
    "layers of the kind": "zamba2 lfm3 deepseek_v32 kimi_linear",
    "attention mask of their own": "doge",
}


NO_NORM_WEIGHTS = {"olmo", "nanochat", "hrm_text"}


ROPES = (
    {"rope_type": "linear"}, {"rope_type": "dynamic"}, {"rope_type": "yarn", "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "original_max_position_embeddings": 32, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
)  # fmt: skip


RANDOM = model_section(path=None, weights="random")
SETTINGS: dict[str, Any] = {"compute": torch.float32, "seed": 0, "device": torch.device("cpu")}


def tiny(model_type: str, **changes: object) -> PretrainedConfig:
    known = AutoConfig.for_model(model_type).to_dict()
    if "kv_lora_rank" in known:  # all heads have keys of their own, made from few numbers
        changes = {"num_key_value_heads": SIZES["num_attention_heads"], **changes}
    return AutoConfig.for_model(model_type, **{name: value for name, value in SIZES.items() if name in known} | changes)


def small(model_type: str) -> PretrainedConfig:
    return tiny(model_type, **{**CHANGES, **IN_LINES}.get(model_type, {}))


def made(config: PretrainedConfig) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    attention.attach(model, "varlen")
    return CausalLM(model)


@pytest.mark.parametrize("model_type", KEPT_APART)
def test_a_row_of_a_pack_gets_what_transformers_gives_the_row_alone(model_type: str) -> None:
    model, rows = made(small(model_type)), some_rows([7, 12])
    with torch.no_grad():
        together = model(packed(rows), logits)
        alone = _alone(model, rows)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def _error_in_bf16(norm: Callable[..., torch.Tensor], exact: Callable[..., torch.Tensor], width: int) -> float:
    """The largest relative error of an output, over rows whose mean squares are anything."""
    x_BD = torch.randn(512, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, expected = norm(x_BD).float(), exact(x_BD.float())
    return ((found - expected).abs() / expected.abs().clamp(min=1e-2)).max().item()


@pytest.mark.parametrize("model_type", KEPT_APART)
def test_norms_in_bf16_are_computed_in_float32_and_rounded(model_type: str) -> None:
    """What upcast_layernorm is for, in other programs. Two roundings: of what is normed, and of its product with the weight."""
    norms = {
        (type(module), module.weight.shape): module
        for module in AutoModelForCausalLM.from_config(small(model_type), dtype=torch.float32).modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None and module.weight.ndim == 1
    }
    assert norms or model_type in NO_NORM_WEIGHTS
    for norm in norms.values():
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0).data.copy_(norm.weight.bfloat16())
        error = _error_in_bf16(copy.deepcopy(norm).bfloat16(), norm, len(norm.weight))
        assert error <= 2**-7 + 2**-11, type(norm).__name__


def test_a_norm_in_bf16_throughout_would_be_seen() -> None:
    weight = torch.linspace(0.5, 2.0, 32).bfloat16()

    def norm(x_BD: torch.Tensor) -> torch.Tensor:
        w = weight.to(x_BD.dtype)
        return w * (x_BD * torch.rsqrt(x_BD.pow(2).mean(-1, keepdim=True) + 1e-6))

    assert _error_in_bf16(norm, norm, 32) > 2**-7 + 2**-11


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_scaled_positions_are_those_of_a_row_alone(rope: dict) -> None:
    model, rows = made(tiny("llama", rope_parameters={"rope_theta": 10000.0, "factor": 2.0, **rope})), some_rows([7, 30, 12])
    with torch.no_grad():
        torch.testing.assert_close(model(packed(rows), logits), _alone(model, rows), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_attention_sinks_take_their_part_and_learn(backend: str) -> None:
    model, rows = made(tiny("gpt_oss", layer_types=["sliding_attention", "full_attention"])), some_rows([7, 12])
    for layer in model.base.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    attention.attach(model.base, backend)
    model(packed(rows), cross_entropy).sum().backward()
    found = [layer.self_attn.sinks.grad.clone() for layer in model.base.model.layers]
    model.zero_grad()
    model.base.set_attn_implementation("eager")
    for ids, (first, _) in rows:
        before = model.base(input_ids=torch.tensor(ids).long()[None], use_cache=False).logits[0, first - 1 : -1]
        torch.nn.functional.cross_entropy(before, torch.tensor(ids[first:]).long(), reduction="sum").backward()
    for layer, grad in zip(model.base.model.layers, found, strict=True):
        torch.testing.assert_close(grad, layer.self_attn.sinks.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", [*KEPT_APART, *IN_LINES])
def test_an_adapter_learns_in_packs_as_in_lines_and_plain_peft_loads_it(model_type: str, tmp_path: Path) -> None:
    config = small(model_type)
    in_lines = needs_lines(config, model_class(config))
    together, _ = _trained(config, [] if in_lines else [packed(some_rows([7, 12]))])
    policy, losses = _trained(config, [collate([[row] for row in some_rows([7, 12])], length=16, pad_id=0)])
    assert losses[2] < losses[0] and all(parameter.grad is not None for parameter in policy.adapters.trained(OWN).values())
    if not in_lines:
        for one, other in zip(*(model.adapters.trained(OWN).values() for model in (together, policy)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    policy.adapters.save(OWN, tmp_path)
    policy.eval()
    loaded = PeftModel.from_pretrained(load_model(config, None, weights="random", dtype=torch.float32, seed=0), tmp_path).eval()
    again, _ = build_policy(config, RANDOM, SavedAdapter(path=str(tmp_path), setting="adapter.path"), **SETTINGS)
    loaded.set_attn_implementation("eager")
    (row,) = some_rows([12])
    batch = collate([[row]], length=12, pad_id=0)
    with torch.no_grad():
        found = policy(batch, logits)
        torch.testing.assert_close(again.eval()(batch, logits), found, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(_by_itself(loaded, row[0], row[1][0]), found, atol=2e-5, rtol=1e-4)


def _trained(config: PretrainedConfig, batches: list[Batch]) -> tuple[Policy, list[float]]:
    """With an adapter on all of its linear layers, after three steps on each batch, and the loss before each step."""
    policy, _ = build_policy(config, RANDOM, lora_section(), **SETTINGS)
    optimizer = torch.optim.SGD(policy.adapters.trained(OWN).values(), lr=0.1)
    losses = []
    for batch in batches * 3:
        optimizer.zero_grad()
        loss = policy.train()(batch, cross_entropy).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return policy, losses


@pytest.mark.parametrize("model_type", IN_LINES)
def test_a_row_in_a_line_for_itself_gets_what_transformers_gives_the_row_alone(model_type: str) -> None:
    """Its adapter's tensors all get a gradient."""
    config = small(model_type)
    model, choice = build_policy(config, RANDOM, lora_section(), **SETTINGS)
    assert isinstance(model, CausalLM) and "with unpacked rows" in choice
    operations(model, config)
    model, rows = model.eval(), some_rows([7, 12, 9])
    batch = collate([[row] for row in rows], length=16, pad_id=0)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, logits), _by_itself_each(model, rows), atol=2e-5, rtol=1e-4)
    model.train()(batch, cross_entropy).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("model_type", IN_LINES)
def test_a_model_that_needs_lines_is_refused_in_packs_with_the_setting_that_gives_them(model_type: str) -> None:
    config = small(model_type)
    known = model_class(config)
    assert known is not None and needs_lines(config, known)
    check_isolation(config, known)
    with pytest.raises(ConfigError, match=rf"data\.packing must be false for {model_type}, .* Set data\.packing=false"):
        check_isolation(config, known, packing=True)


@pytest.mark.parametrize("model_type", sorted({*KEPT_APART} - {*ATTENDS_TWICE}))
def test_a_row_over_a_cache_gets_what_transformers_gives_it_at_once(model_type: str) -> None:
    """A chunk, then the rest a token at a time, which ends beyond the window; two rows in a step."""
    model, rows = made(small(model_type)), some_rows([12, 12])
    cache = PagedCache(6, 4, dtype=torch.float32, device=torch.device("cpu"))
    tables, found = ([4, 0, 3], [1, 5, 2]), ([], [])
    with torch.no_grad():
        for start, end in [(0, 3), *((at, at + 1) for at in range(3, 12))]:
            new = [NewTokens(ids[start:end].tolist(), start, table) for (ids, _), table in zip(rows, tables, strict=True)]
            parts = model.hidden(CachedRows.of(cache, new))[0].chunk(2)
            for number, part in enumerate(parts):
                found[number].append(model.logits(part))
        alone = _alone(model, rows)
    cached = torch.cat([torch.cat(parts)[first - 1 : -1] for parts, (_, (first, _)) in zip(found, rows, strict=True)])
    torch.testing.assert_close(cached, alone, atol=2e-5, rtol=1e-4)


def _alone(model: CausalLM, rows: list) -> torch.Tensor:
    """By transformers' own attention, of which sdpa leaves caps of scores out."""
    model.base.set_attn_implementation("eager")
    return _by_itself_each(model, rows)


def _by_itself_each(model: CausalLM, rows: list) -> torch.Tensor:
    return torch.cat([_by_itself(model, ids, first) for ids, (first, _) in rows])


def _by_itself(model: Any, ids: object, first: int) -> torch.Tensor:
    """Logits before each trained token, of a policy's base or of a model of PEFT's."""
    whole = model.base if isinstance(model, CausalLM) else model
    return whole(input_ids=torch.tensor(ids).long()[None], use_cache=False).logits[0, first - 1 : -1]


@pytest.mark.parametrize(
    ("model_type", "said"), [(family, said) for said, families in NOT_KEPT_APART.items() for family in families.split()]
)
def test_a_model_whose_rows_would_see_each_other_is_refused_by_its_config(model_type: str, said: str) -> None:
    config = AutoConfig.for_model(model_type)
    known = model_class(config)
    assert known is not None
    with pytest.raises(ConfigError, match=f"model.path must be .*, which {model_type} does not: .*{said}"):
        check_isolation(config, known)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [("bert", "causal attention"), ("roberta", "causal attention")],
)
def test_a_model_of_which_that_shows_in_its_layers_is_refused_by_them(model_type: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(tiny(model_type))(packed(some_rows([7, 12])), logits)


def test_every_architecture_of_transformers_is_tried_or_refused() -> None:
    """A new release of it may have one that looks as if it kept rows apart."""
    known = {*KEPT_APART, *IN_LINES, *REFUSED_BY_LAYERS.split()}
    assert {model_type for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if taken(model_type)} <= known


def taken(model_type: str) -> bool:
    """In packs or in lines, by the rules that look at a config alone; several media have tests of their own."""
    try:
        config = AutoConfig.for_model(model_type)
        check_trainable(config)
        known = model_class(config)
        assert known is not None
        check_isolation(config, known)
        return not is_multimodal(config)
    except (ConfigError, ValueError, StrictDataclassError):  # it has several texts, or no sizes that fit each other
        return False


def test_the_lines_of_every_family_that_needs_them_are_tried() -> None:
    assert sorted(IN_LINES) == sorted(ONE_ROW_A_LINE)


@pytest.mark.parametrize("model_type", ["phimoe", "qwen2_moe"])
def test_a_window_that_a_model_puts_in_its_mask_alone_is_kept(model_type: str) -> None:
    windows = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    model, rows = made(tiny(model_type, **windows if model_type == "qwen2_moe" else {})), some_rows([7, 12])
    with torch.no_grad():
        torch.testing.assert_close(model(packed(rows), logits), _alone(model, rows), atol=2e-5, rtol=1e-4)


def test_no_adapter_is_put_on_a_layer_that_is_passed_over() -> None:
    """A state-space mixer's kernels read the weights of its other layers."""
    model = AutoModelForCausalLM.from_config(tiny("jamba", **IN_LINES["jamba"]))
    names = {name.rpartition(".")[2] for name in targeted(model, lora_section())}
    assert "in_proj" in names and not names & {"out_proj", "x_proj", "dt_proj", "conv1d"}
    with pytest.raises(ConfigError, match=r"adapter\.targets can't name layers whose weights the model reads directly.*dt_proj"):
        targeted(model, lora_section(targets=["in_proj", "dt_proj"]))


@pytest.mark.parametrize("model_type", ["mamba", "bloom", "nemotron", "qwen3_next", *ATTENDS_TWICE])
def test_a_model_that_a_cache_of_keys_and_values_is_not_enough_for_is_refused_by_it(model_type: str) -> None:
    with pytest.raises(ConfigError, match=f"engine can't be native for {model_type}, whose layers .* Set engine=hf"):
        check_cached(small(model_type))


@pytest.mark.parametrize(("family", "router"), [("phimoe", "router"), ("hunyuan_v1_moe", "wg"), ("jetmoe", "layer")])
def test_a_router_that_is_a_linear_layer_gets_no_adapter_alone_or_among_several(family: str, router: str) -> None:
    """Nor is it quantized."""
    model = AutoModelForCausalLM.from_config(tiny(family))
    assert any(name.endswith(f".{router}") and hasattr(module, "weight") for name, module in model.named_modules())
    assert not any(name.endswith(f".{router}") for name in targeted(model, lora_section()))
    assert router not in {name for _, name, _ in linears_but(layers(model), ())}
    assert not any(name.endswith(f".{router}") for name in bank_of(model, Slots((lora_section(),)), torch.float32)._layers)


def test_a_dense_model_of_a_family_of_mixtures_gets_no_adapters_of_experts() -> None:
    """PEFT takes some names of its layers for those of experts, of which the small model of beam has none."""
    model = AutoModelForCausalLM.from_config(small("beam"))
    config: Any
    config, found = new_config(model, lora_section(), METHODS["lora"])
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    taken = sorted({name.rpartition(".")[2] for name in linear - found.keys()})
    with pytest.raises(ConfigError, match=r"takes them for parts of its experts, got .*\. Leave them out\.$"):
        new_config(model, lora_section(targets=taken), METHODS["lora"])
    (adapters := PeftAdapters(model)).add_own(lora_section())
    assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapters.trained(OWN)} == {*found}
    saved: Any = adapters._file(OWN, None)[0]
    assert not config.target_parameters and not saved.target_parameters


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "youtu", "axk1", "longcat_flash"])
def test_oft_is_refused_on_latent_keys_and_values(family: str) -> None:
    section = load_config("train", ["data.path=x", "adapter=oft", "adapter.block_size=8"]).adapter
    with pytest.raises(ConfigError, match=r"adapter can't be oft for .*kv_b_proj: its inputs have four axes"):
        PeftAdapters(AutoModelForCausalLM.from_config(small(family))).add_own(section)


def test_a_hybrid_family_without_a_layer_that_carries_a_state_is_taken() -> None:
    model, rows = made(tiny("granitemoehybrid", layer_types=["full_attention"] * 2, mamba_n_heads=4)), some_rows([7, 12])
    together = model(packed(rows), logits)
    assert torch.allclose(together, torch.cat([model(packed([row]), logits) for row in rows]), atol=1e-5)

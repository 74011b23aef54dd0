"""Models of every kind: rows are computed as by themselves, in a pack and over a cache, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from raytune_llm.errors import ConfigError
from raytune_llm.models import attention
from raytune_llm.models.attention.cache import CachedRows, NewTokens, PagedCache
from raytune_llm.models.attention.isolation import check_isolation
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import model_class
from tests.models import VOCABULARY, logits, packed, some_rows

SIZES = (
    {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "ffn_dim": 48, "word_embed_proj_dim": 32}
    | {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "sliding_window": 4}
)
"""By the names that families have for them."""
KEPT_APART = (
    "llama mistral ministral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 olmoe "
    "cohere cohere2 granite granitemoe gpt2 gpt_bigcode gpt_neox opt starcoder2 glm glm4 glm4_moe smollm3 exaone4 ernie4_5 "
    "seed_oss hunyuan_v1_dense deepseek_v2 deepseek_v3 minicpm3 helium jetmoe nanochat persimmon apertus"
)
NOT_KEPT_APART = {
    "in a way of their own": "falcon mpt bloom xglm gptj codegen gpt_neo stablelm openai-gpt bart biogpt",
    "layers of the kind": "mamba mamba2 falcon_mamba rwkv bamba jamba granitemoehybrid nemotron_h qwen3_next qwen3_5_text zamba2 "
    "olmo_hybrid recurrent_gemma lfm3 falcon_h1 minimax llama4_text deepseek_v32 kimi_linear",
}


def tiny(model_type: str, **changes: object) -> PretrainedConfig:
    known = AutoConfig.for_model(model_type).to_dict()
    if "kv_lora_rank" in known:  # all heads have keys of their own, made from few numbers
        changes = {"num_key_value_heads": SIZES["num_attention_heads"], **changes}
    return AutoConfig.for_model(model_type, **{name: value for name, value in SIZES.items() if name in known} | changes)


def made(config: PretrainedConfig) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    attention.attach(model, "varlen")
    return CausalLM(model)


@pytest.mark.parametrize("model_type", KEPT_APART.split())
def test_a_row_of_a_pack_gets_what_transformers_gives_the_row_alone(model_type: str) -> None:
    model, rows = made(tiny(model_type)), some_rows([7, 12])
    with torch.no_grad():
        together = model(packed(rows), logits)
        alone = _alone(model, rows)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", KEPT_APART.split())
def test_a_row_over_a_cache_gets_what_transformers_gives_it_at_once(model_type: str) -> None:
    """A chunk, then the rest a token at a time, which ends beyond the window; two rows in a step."""
    model, rows = made(tiny(model_type)), some_rows([12, 12])
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
    return torch.cat([_by_itself(model, ids, first) for ids, (first, _) in rows])


def _by_itself(model: CausalLM, ids: object, first: int) -> torch.Tensor:
    """Logits before each trained token."""
    return model.base(input_ids=torch.tensor(ids).long()[None], use_cache=False).logits[0, first - 1 : -1]


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
    [("doge", "its own attention mask"), ("nemotron", "passes cu_seqlens on"), ("bert", "causal attention")],
)
def test_a_model_of_which_that_shows_in_its_layers_is_refused_by_them(model_type: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(tiny(model_type))(packed(some_rows([7, 12])), logits)


def test_a_hybrid_family_without_a_layer_that_carries_a_state_is_taken() -> None:
    model, rows = made(tiny("granitemoehybrid", layer_types=["full_attention"] * 2, mamba_n_heads=4)), some_rows([7, 12])
    together = model(packed(rows), logits)
    assert torch.allclose(together, torch.cat([model(packed([row]), logits) for row in rows]), atol=1e-5)

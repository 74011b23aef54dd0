"""LoRA on the experts of a mixture, whose weights are one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models import attention
from raytune_llm.models.adapters import OWN, adapt
from raytune_llm.models.causal_lm import CausalLM
from tests.models import VOCABULARY, logits, lora_section, packed, some_rows

SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "moe_intermediate_size": 16}
SIZES |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "max_position_embeddings": 64}
SIZES |= {
    "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "first_k_dense_replace": 0,
}
SIZES |= {"qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}


def mixture(model_type: str = "qwen3_moe", **sizes: int) -> Any:
    torch.manual_seed(0)
    known = AutoConfig.for_model(model_type).to_dict()
    config = AutoConfig.for_model(model_type, **{name: value for name, value in (SIZES | sizes).items() if name in known})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_each_expert_learns_and_the_adapter_is_the_same_in_plain_peft_and_merged(model_type: str, tmp_path: Path) -> None:
    base = mixture(model_type)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    attention.attach(base, "varlen")
    adapted = adapt(base, lora_section(experts=True))
    policy, batch = CausalLM(adapted.model, adapters=adapted), packed(some_rows([7, 12, 9]))
    trained = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    of_experts = [name for name in trained if ".experts." in name]
    assert len(of_experts) == 2 * 2 * 2  # A and B of two weights a layer
    assert not any("router" in name or ".gate." in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(policy(batch, cross_entropy).sum())
        losses[-1].backward()
        assert all(trained[name].grad is not None for name in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    frozen = {name.replace(".base_layer", ""): value for name, value in adapted.base.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(value, frozen[name]) for name, value in before.items())
    policy.eval()
    adapted.save(OWN, tmp_path)
    ids = torch.tensor([[5, 3, 8, 13, 2, 7]])
    plain = PeftModel.from_pretrained(mixture(model_type).eval(), tmp_path)
    row = (ids[0].numpy().astype("int32"), torch.tensor([1, 6]).int().numpy())
    with torch.no_grad():
        ours, theirs = policy(packed([row]), logits), plain(input_ids=ids).logits[0, :-1]
        merged = plain.merge_and_unload()(input_ids=ids).logits[0, :-1]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged, theirs, atol=1e-5, rtol=1e-4)


def test_a_model_without_experts_and_a_rank_above_theirs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.experts must be false for qwen3, which has no experts"):
        adapt(mixture("qwen3"), lora_section(experts=True))
    with pytest.raises(ConfigError, match=r"adapter\.rank must be at most 16, the smaller side of an expert, got 17"):
        adapt(mixture(), lora_section(experts=True, rank=17, targets=["q_proj"]))


def test_an_adapter_of_experts_is_continued_as_one(tmp_path: Path) -> None:
    adapt(mixture(), lora_section(experts=True)).save(OWN, tmp_path)
    with pytest.raises(ConfigError, match=r"adapter\.experts must be as in the adapter that is continued, true, got False"):
        adapt(mixture(), lora_section(path=str(tmp_path)))


def adapted_parts(model: Any) -> set[str]:
    return {
        name.partition(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_A" in name
    }


def test_experts_of_some_layers_alone() -> None:
    names = adapted_parts(adapt(mixture(), lora_section(experts=True, last_layers=1)).model)
    assert any("layers.1.mlp.experts" in name for name in names) and not any("layers.0" in name for name in names)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "gpt_oss", "olmoe"])
@pytest.mark.parametrize("placed", [{}, {"last_layers": 1}, {"targets": ".*layers.1.*[qo]_proj", "dropout": 0.1}])
def test_without_them_neither_experts_nor_routers_have_an_adapter(model_type: str, placed: dict[str, Any]) -> None:
    """PEFT would put one on those of all layers."""
    names = adapted_parts(adapt(mixture(model_type), lora_section(**placed)).model)
    assert any(name.endswith(".o_proj") for name in names)
    assert not any(".experts" in name or name.endswith((".gate", ".router")) for name in names)
    assert any("layers.0." in name for name in names) == (not placed)


def test_layers_that_peft_takes_for_experts_are_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.targets can't name gate_proj, up_proj of deepseek_v2: .*adapter\.experts=true"
    ):
        adapt(mixture("deepseek_v2"), lora_section(targets=["o_proj", "gate_proj", "up_proj"]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["adapter.dropout=0.1"], r"adapter\.dropout must be 0 if adapter\.experts is true"),
        (["strategy=zero3"], r"strategy can't be zero3 with adapter=lora"),
        (["train.compile=true"], r"train\.compile can't be true: adapter\.experts=true"),
    ],
)
def test_what_it_does_not_go_with_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("train", ["data.path=x", "adapter.experts=true", *settings])

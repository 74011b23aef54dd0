"""What a policy leaves behind, what it was found as, and what it answers, beside plain transformers and PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PretrainedConfig

from raytune_llm.config.adapter import NoAdapter, SavedAdapter
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.batch import BatchEngine
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.models.build import build_policy
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import load_config
from tests.models import model_section, packed, some_rows

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
DEEPSEEK = SIZES | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}  # fmt: skip


def saved(config: PretrainedConfig, folder) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    model.save_pretrained(folder)
    return str(folder)


def policy_of(path: str, adapter=None, **changes: object) -> CausalLM:
    section = model_section(
        path=path, revision=None, weights="pretrained", config=changes, tokenizer="bytes", trust_remote_code=False,
        attention="auto",
    )  # fmt: skip
    settings = {"compute": torch.float32, "seed": 0, "device": CPU}
    policy, _ = build_policy(load_config(path, changes), section, adapter or NoAdapter(name="none"), **settings)
    assert isinstance(policy, CausalLM)
    return policy.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A model and an adapter of it."""
    base = saved(LlamaConfig(**SIZES), tmp_path_factory.mktemp("base"))
    torch.manual_seed(1)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter = tmp_path_factory.mktemp("adapter")
    peft.save_pretrained(adapter)
    return base, str(adapter)


def test_greedy_answers_are_those_of_transformers_and_peft(folders):
    base, adapter = folders
    told: list[tuple[int, int]] = []
    policy = policy_of(base, SavedAdapter(path=adapter, setting="x"))
    engine = BatchEngine(policy, byte_tokenizer(), device=CPU, max_rows=3, on_answered=lambda *counts: told.append(counts))
    prompts = [ids.tolist() for ids, _ in some_rows([3, 40, 17, 1, 24])]
    sampling = Sampling(max_new_tokens=20)
    answers = engine.generate([Request(prompt_ids=prompt, sampling=sampling) for prompt in prompts])
    assert told == sorted(told) and told[0][0] < 5 and told[-1] == (5, 5)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ends = [1, byte_tokenizer().eos_token_id]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False, "eos_token_id": ends}
        [expected] = plain.generate(input_ids=ids, **settings, pad_token_id=258)[:, len(prompt) :].tolist()
        assert list(answer.ids) == [id for id in expected if id not in ends]


def test_generating_leaves_mode_and_random_state_alone(folders):
    policy = policy_of(folders[0]).train()
    before = torch.get_rng_state()
    [answer] = BatchEngine(policy, byte_tokenizer(), stop_ids=range(259), device=CPU).generate([Request(prompt_ids=[5, 6])])
    assert policy.training and torch.equal(torch.get_rng_state(), before)
    assert (answer.ids, answer.finish) == ((), "stop")


def test_buffers_that_belong_to_the_weights_are_saved(tmp_path):
    policy = policy_of(saved(DeepseekV3Config(**DEEPSEEK), tmp_path / "base"))
    parameters = dict(policy.named_parameters())
    policy.save(tmp_path / "final", parameters=parameters, tokenizer=byte_tokenizer(), stop_ids=[257])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = policy.logits(policy.hidden(packed([(ids[0].int().numpy(), torch.tensor([0, 1]).numpy())]))[0])
        torch.testing.assert_close(again(input_ids=ids).logits[0], expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_has_the_changed_config_and_the_stop_tokens_beside_it(folders, tmp_path):
    base, adapter = folders
    for name, changes in (("as it was", {}), ("changed", {"rope_theta": 1234.0})):
        policy = policy_of(base, SavedAdapter(path=adapter, setting="x"), **changes)
        parameters = {name: value for name, value in policy.named_parameters() if "lora_" in name}
        policy.save(tmp_path / name, parameters=parameters, tokenizer=byte_tokenizer(), stop_ids=[257], base_model=base)
        assert (tmp_path / name / "config.json").exists() == bool(changes)
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == [1, 257]
        assert (tmp_path / name / "adapter_model.safetensors").exists() and (tmp_path / name / "tokenizer.json").exists()


@torch.no_grad()
def test_the_reference_is_what_was_found(folders):
    policy, batch = policy_of(folders[0]), packed(some_rows([9, 14]))
    found = policy.hidden(batch)
    policy.keep_as_found()
    for parameter in policy.parameters():
        parameter.mul_(1.1)
    now = policy.hidden(batch)
    with policy.reference():
        torch.testing.assert_close(policy.hidden(batch), found)
    assert torch.equal(policy.hidden(batch), now) and not torch.allclose(now, found)

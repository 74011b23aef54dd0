"""A served reward model gives the scores that transformers gives, and embeddings are those of its hidden states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from raytune_llm import ConfigError, api, load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.serve.api.app import build_app
from raytune_llm.serve.api.server import Access
from raytune_llm.serve.backend import InProcessBackend
from raytune_llm.serve.engines import build_engine, tokenizer_of
from raytune_llm.serve.prompts import Prompts
from tests.runs import tiny_run

TALK = [{"role": "user", "content": "the quick fox?"}, {"role": "assistant", "content": "jumps over"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SmolLM2 has it, padding is the token that ends answers."""
    folder, end = tmp_path_factory.mktemp("base"), byte_tokenizer().eos_token_id
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, eos_token_id=end, pad_token_id=end)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": f"what is {n}?"}],
            "chosen": {"role": "assistant", "content": f"{n} it is"},
            "rejected": {"role": "assistant", "content": f"no {n * n}"},
        }
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def client_of(*settings: str):
    run = load_config("serve", ["serve.precision=fp32", *settings])
    engine, facts = build_engine(run.model, run.quantization, run.engine, run.serve)
    prompts = Prompts(tokenizer_of(run.model, run.serve)[0])
    access = Access(api_key=None, admin_key=None, roots=[], max_body_bytes=100_000)
    return engine, TestClient(build_app(InProcessBackend(engine, facts, max_waiting=8), prompts, access))


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_scores_are_those_of_transformers(adapter: str, base: Path, pairs: str, cache: str, tmp_path: Path):
    settings = ["data=chat_pairs", "stage=reward", "train.epochs=1", "optimizer.lr=1e-2", f"adapter={adapter}"]
    final = api.train(tiny_run(pairs, cache, tmp_path, *settings, "model=hub", f"model.path={base}")).final
    if adapter == "lora":
        engine, client = client_of("model=hub", f"model.path={base}", f"serve.adapters={{reward: {final}}}")
        plain = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), final).eval()
    else:
        engine, client = client_of("model=hub", f"model.path={final}", "serve.base_name=reward")
        plain = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    ids = tokenizer(
        text[: text.rindex("<|im_end|>") + len("<|im_end|>")], return_tensors="pt", add_special_tokens=False
    ).input_ids
    with torch.no_grad():
        expected = plain(input_ids=ids).logits.item()
    try:
        told = client.post("/v1/score", json={"model": "reward", "messages": TALK}).json()
        assert told["data"][0]["score"] == pytest.approx(expected, abs=1e-5)
        assert told["usage"]["prompt_tokens"] == ids.shape[1]
        several = client.post("/v1/score", json={"model": "reward", "input": ["a fox", "no"]}).json()
        alone = [client.post("/v1/score", json={"model": "reward", "input": one}).json()["data"][0] for one in ("a fox", "no")]
        assert [one["score"] for one in several["data"]] == pytest.approx([one["score"] for one in alone], abs=1e-5)
        asked = client.post("/v1/chat/completions", json={"model": "reward", "messages": TALK[:1]})
        assert asked.status_code == 400 and "/v1/score" in asked.json()["error"]["message"]
        unanswered = client.post("/v1/score", json={"model": "reward", "messages": TALK[:1]})
        assert unanswered.status_code == 400 and "must be an answer" in unanswered.json()["error"]["message"]
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["reward"]
    finally:
        engine.close()
    if adapter == "lora":
        with pytest.raises(ConfigError, match="must be reward alone"):
            client_of("model=hub", f"model.path={base}", f"serve.adapters={{reward: {final}, other: {final}}}")


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_scores_of_a_head_in_a_separate_file_are_those_of_its_layer(
    adapter: str, base: Path, pairs: str, cache: str, tmp_path: Path
):
    settings = ["data=chat_pairs", "stage=reward", "stage.value_head=v_head", "train.epochs=1", f"adapter={adapter}"]
    final = api.train(tiny_run(pairs, cache, tmp_path, *settings, "model=hub", f"model.path={base}")).final
    head = load_file(final / "value_head.safetensors")
    head["v_head.summary.bias"] = torch.tensor([0.25])  # as LLaMA-Factory trains one
    save_file(head, final / "value_head.safetensors")
    (final.parent / "finished.json").unlink()  # or changed weights would be refused
    if adapter == "lora":
        where = ["model=hub", f"model.path={base}", f"serve.adapters={{reward: {final}}}"]
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final).eval()
    else:
        where = ["model=hub", f"model.path={final}", "serve.base_name=reward"]
        plain = AutoModelForCausalLM.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = tokenizer("the quick fox<|im_end|>", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        last_1D = plain(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1:].float()
    expected = F.linear(last_1D, head["v_head.summary.weight"], head["v_head.summary.bias"]).item()
    engine, client = client_of(*where)
    try:
        told = client.post("/v1/score", json={"model": "reward", "input": "the quick fox<|im_end|>"}).json()
        assert told["data"][0]["score"] == pytest.approx(expected, abs=1e-5)
    finally:
        engine.close()
    with pytest.raises(ConfigError, match="engine"):
        client_of(*where, "engine=hf")
    if adapter == "lora":
        engine, _ = client_of("model=hub", f"model.path={base}")
        with pytest.raises(ConfigError, match=r"value_head\.safetensors"):
            engine.add_adapter("reward", final)
        engine.close()


def test_embeddings_are_those_of_the_last_hidden_states(base: Path):
    engine, client = client_of("model=hub", f"model.path={base}", "serve.base_name=base")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), byte_tokenizer()
    texts = ["a fox", "a lazy dog jumps"]
    try:
        for pooling in ("mean", "last"):
            body = {"model": "base", "input": texts, "pooling": pooling}
            told = client.post("/v1/embeddings", json=body).json()["data"]
            for text, one in zip(texts, told, strict=True):
                with torch.no_grad():
                    hidden_LD = plain.model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).last_hidden_state[0]
                expected = F.normalize(hidden_LD.mean(0) if pooling == "mean" else hidden_LD[-1], dim=0)
                assert torch.allclose(torch.tensor(one["embedding"]), expected, atol=1e-5)
    finally:
        engine.close()

"""New tokens are trained and saved with an adapter, resume, and are merged and served as they were trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from raytune_llm import ConfigError, api, load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.serve.api.app import build_app
from raytune_llm.serve.api.server import Access
from raytune_llm.serve.backend import InProcessBackend
from raytune_llm.serve.engines import build_engine, tokenizer_of
from raytune_llm.serve.prompts import Prompts
from tests.group import Group
from tests.invariant.test_same_run_everywhere import assert_same_run
from tests.runs import PowerCut, cut_at, tiny_run

TOKENS = ("<light>", "<door>")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [(f"a{TOKENS[n % 2]} in room {n}?", f"{TOKENS[n % 2]} {n}") for n in range(40)]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def whole(request: pytest.FixtureRequest, rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """A run of LoRA on a base whose embeddings have no room for more."""
    base = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(**sizes, tie_word_embeddings=request.param, eos_token_id=257)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    settings = ["data=chat", "model=hub", f"model.path={base}", f"model.new_tokens=[{','.join(TOKENS)}]", "optimizer.lr=1e-2"]
    run = tiny_run(rows, cache, tmp_path_factory.mktemp("run"), *settings, "data.max_length=64", "data.packing=false")
    api.train(run)
    return run


def final(run: TrainRun) -> Path:
    return Path(run.output_dir) / "final"


def deltas(run: TrainRun) -> dict[str, torch.Tensor]:
    saved = load_file(final(run) / "adapter_model.safetensors")
    return {name: value for name, value in saved.items() if "trainable_tokens" in name}


def test_an_adapter_with_them_is_not_merged_below_another(whole: TrainRun, tmp_path: Path):
    words = ["model=hub", f"model.path={whole.model.path}", f"model.merged_adapters=['{final(whole)}']", "resources=inline"]
    said = r"model\.merged_adapters must not have embeddings of new tokens.*set model\.path to the result"
    with pytest.raises(ConfigError, match=said):
        api.train(load_config("train", [*words, "data=chat", f"data.path={whole.data.path}", f"output_dir={tmp_path / 'run'}"]))
    with pytest.raises(ConfigError, match=said):
        api.export(load_config("export", [*words, f"export.output_dir={tmp_path / 'out'}"]))
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_they_are_trained_and_peft_loads_them_alone_and_merged(whole: TrainRun):
    tied = len(deltas(whole)) == 1
    assert tied or len(deltas(whole)) == 2
    tokenizer = AutoTokenizer.from_pretrained(final(whole))
    base: Any = AutoModelForCausalLM.from_pretrained(str(whole.model.path))
    for name, value in deltas(whole).items():
        head = "lm_head" in name
        old = (base.get_output_embeddings() if head else base.get_input_embeddings()).weight
        for token, row in zip(TOKENS, value, strict=True):
            began = old[list(token.encode())].mean(0)
            assert 1e-3 < (row - began).abs().max() < 0.5, (name, token)
    plain: Any = AutoPeftModelForCausalLM.from_pretrained(final(whole)).eval()
    ids = tokenizer("a<light> in room 3?<door>", return_tensors="pt", add_special_tokens=False).input_ids
    assert {259, 260} <= set(ids[0].tolist())
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
        merged = plain.merge_and_unload()(input_ids=ids).logits
    assert torch.allclose(logits, merged, atol=1e-5)


def test_a_plan_counts_them(whole: TrainRun):
    saved = load_file(final(whole) / "adapter_model.safetensors")
    assert api.plan(whole).saved_bytes == sum(value.numel() * value.itemsize for value in saved.values())


def test_an_export_has_them_in_its_embeddings_and_its_vocabulary(whole: TrainRun, tmp_path: Path):
    words = [f"export.run={whole.output_dir}", f"export.output_dir={tmp_path / 'out'}", "export.dtype=fp32"]
    done = api.export(load_config("export", words))
    assert done.difference is not None and done.difference.max_abs < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain: Any = AutoPeftModelForCausalLM.from_pretrained(final(whole)).eval()
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokenizer("a<light> in room 3?<door>", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        assert torch.allclose(found(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    assert found.config.vocab_size == 261


def test_cut_off_and_resumed_they_are_the_same(whole: TrainRun, tmp_path: Path):
    run = replace(whole, output_dir=str(tmp_path), checkpoint=replace(whole.checkpoint, every_steps=2))
    with pytest.raises(PowerCut):
        api.train(run, sinks=[cut_at(5)])
    assert api.train(run).resumed_from == 4
    assert_same_run(whole, run)


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_they_are_served_alone_as_they_were_trained(engine: str, whole: TrainRun):
    words = ["model=hub", f"model.path={whole.model.path}", f"serve.adapters={{run: {final(whole)}}}"]
    run = load_config("serve", ["serve.precision=fp32", f"engine={engine}", "serve.max_length=64", *words])
    built, facts = build_engine(run.model, run.quantization, run.engine, run.serve)
    tokenizer, _ = tokenizer_of(run.model, run.serve)
    access = Access(api_key=None, admin_key=None, roots=[], max_body_bytes=100_000)
    client = TestClient(build_app(InProcessBackend(built, facts, max_waiting=8), Prompts(tokenizer), access))
    base: Any = AutoModelForCausalLM.from_pretrained(str(whole.model.path))
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    plain: Any = PeftModel.from_pretrained(base, str(final(whole))).eval()
    prompt = "a<light> in room 7?"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    made = plain.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=257, pad_token_id=258)[0, ids.shape[1] :]
    try:
        body = {"model": "run", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        told = client.post("/v1/completions", json=body).json()
        assert told["choices"][0]["text"] == tokenizer.decode(made, skip_special_tokens=True)
    finally:
        built.close()
    run = load_config("serve", [*words[:2], f"serve.adapters={{run: {final(whole)}, other: {final(whole)}}}"])
    with pytest.raises(ConfigError, match="must be run alone, which has tokens"):
        build_engine(run.model, run.quantization, run.engine, run.serve)


def test_an_adapter_is_continued_with_its_tokens_only(whole: TrainRun, tmp_path: Path):
    section = replace(whole.adapter, path=str(final(whole)))
    more = replace(whole, output_dir=str(tmp_path / "more"), adapter=section)
    assert api.train(more).final is not None
    without = replace(more, output_dir=str(tmp_path / "without"), model=replace(whole.model, new_tokens=[]))
    with pytest.raises(ConfigError, match=r"adapter\.path must hold the embeddings of the run's new tokens: 2 there, 0 here"):
        api.train(without)
    assert not (tmp_path / "without").exists()


def test_sharded_they_train_alike(whole: TrainRun, two_workers: Group, tmp_path: Path):
    chosen = load_config("train", ["strategy=fsdp", "data.path=x"])
    store = str(prepare(whole.model, whole.data, whole.resources).store.folder)
    run = replace(whole, output_dir=str(tmp_path), strategy=chosen.strategy, resources=chosen.resources)
    two_workers.run(run, store)
    assert_same_run(whole, run)


def test_all_weights_trained_the_saved_model_has_them(whole: TrainRun, tmp_path: Path):
    run = replace(whole, output_dir=str(tmp_path), adapter=load_config("train", ["adapter=none", "data.path=x"]).adapter)
    api.train(run)
    model: Any = AutoModelForCausalLM.from_pretrained(final(run))
    assert (
        model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == len(AutoTokenizer.from_pretrained(final(run)))
    )

"""Answers of the policy while it is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_llm import ConfigError, api
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.hf import HFEngine
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.models.build import run_config
from raytune_llm.models.load import load_model
from tests.group import metrics
from tests.runs import tiny_run


def samples(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=["lora", "none"])
def done(request, chat_rows, cache, tmp_path_factory):
    """A run that learns something in its few steps, and says what it answers."""
    overrides = ["train.sample_rows=3", "train.max_new_tokens=8", "train.eval_every_steps=3", "train.max_steps=6"]
    overrides += ["optimizer.lr=3e-3", "schedule=constant", "data.eval_fraction=0.2", f"adapter={request.param}"]
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("sampled") / request.param, *overrides)
    told = []
    result = api.train(run, on_samples=told.append)
    return run, result, told


def test_the_first_held_out_rows_are_answered_at_each_evaluation(done):
    run, _, told = done
    lines = samples(run.output_dir)
    assert [line["step"] for line in lines] == [3, 3, 3, 6, 6, 6]
    assert [line["row"] for line in lines[:3]] == [line["row"] for line in lines[3:]] == sorted(line["row"] for line in lines[:3])
    assert all("assistant" in line["prompt"] and line["reference"] for line in lines)
    assert [[sample.to_json() for sample in samples] for samples in told] == [lines[:3], lines[3:]]


def test_the_answers_are_those_of_the_saved_model(done):
    run, result, told = done
    tokenizer = byte_tokenizer()
    if run.adapter.name == "none":
        model = AutoModelForCausalLM.from_pretrained(result.final, dtype=torch.float32)
    else:
        config = run_config(run.model, tokenizer, run.data.max_length)
        base = load_model(config, None, weights="random", dtype=torch.float32, seed=run.train.seed)
        model = PeftModel.from_pretrained(base, str(result.final))
    store = prepare(run.model, run.data, run.resources).store
    requests = [
        Request(prompt_ids=store.prompt_and_answer(sample.row)[0].tolist(), sampling=Sampling(max_new_tokens=8))
        for sample in told[-1]
    ]
    answers = [completion.text.strip() for completion in HFEngine(model, tokenizer).generate(requests)]
    assert answers == [sample.answer for sample in told[-1]]


def test_asking_does_not_change_training(done, tmp_path):
    run = done[0]
    silent = replace(run, output_dir=str(tmp_path), train=replace(run.train, sample_rows=0))
    api.train(silent)
    assert not (tmp_path / "samples.jsonl").exists()
    pairs = zip(metrics(run.output_dir), metrics(silent.output_dir), strict=True)
    assert all(a.get(key) == b.get(key) for a, b in pairs for key in ("loss", "grad_norm", "eval_loss"))


def test_a_run_without_held_out_rows_has_nothing_to_ask(chat_rows, cache, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.sample_rows needs held-out rows"):
        tiny_run(chat_rows, cache, tmp_path, "data.eval_fraction=0", "train.sample_rows=3")

"""A reward model that was saved gives the same scores in transformers, and its head those that LLaMA-Factory's would."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from raytune_llm import api
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.samples import split
from raytune_llm.data.tokens.tokenizer import byte_tokenizer, run_tokenizer
from raytune_llm.models.build import run_config
from raytune_llm.models.load import load_model
from tests.group import metrics
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    draw, words = random.Random(0), ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = []
    for _ in range(24):
        prompt, good, bad = (" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(3))
        sides = ({"role": "assistant", "content": good}, {"role": "assistant", "content": bad + " no"})
        rows.append({"messages": [{"role": "user", "content": prompt}], "chosen": sides[0], "rejected": sides[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained(pairs: str, cache: str, folder: Path, *overrides: str) -> TrainRun:
    run = tiny_run(
        pairs, cache, folder, "data=chat_pairs", "stage=reward", "train.epochs=1", "train.global_batch_size=4", *overrides
    )
    api.train(run)
    return run


def margin_of_held_out_rows(run: TrainRun, score) -> float:
    store = prepare(run.model, run.data, run.resources, kind="pairs").store
    _, held_out = split(len(store), run.data.eval_fraction, run.train.seed)
    margins = []
    for row in held_out.tolist():
        prompt, chosen, rejected = (torch.from_numpy(part.copy()).long() for part in store.row(row)[:3])
        margins.append(score(torch.cat([prompt, chosen])[None]) - score(torch.cat([prompt, rejected])[None]))
    return sum(margins) / len(margins)


def fresh(run: TrainRun, *, scores: bool):
    """What training began with."""
    tokenizer, _ = run_tokenizer(run.model, run.data)
    config = run_config(run.model, tokenizer, run.data.max_length)
    return load_model(config, None, weights="random", dtype=torch.float32, seed=run.train.seed, scores=scores)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_transformers_gives_the_scores_of_the_last_evaluation(adapter: str, pairs: str, cache: str, tmp_path: Path) -> None:
    run = trained(pairs, cache, tmp_path, f"adapter={adapter}")
    final = tmp_path / "final"
    if adapter == "lora":
        model = PeftModel.from_pretrained(fresh(run, scores=True), final)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(final)
        assert model.config.num_labels == 1 and model.config.pad_token_id is not None
    with torch.no_grad():
        ours = margin_of_held_out_rows(run, lambda ids: model.eval()(input_ids=ids).logits.item())
    assert math.isclose(ours, metrics(str(tmp_path))[-1]["eval_margin"], rel_tol=1e-4, abs_tol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_scores_are_the_same_elsewhere_where_padding_is_the_token_that_ends_answers(
    adapter: str, pairs: str, cache: str, tmp_path: Path
) -> None:
    """As SmolLM2 has it: transformers leaves that token out."""
    end = byte_tokenizer().eos_token_id
    config = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**config, eos_token_id=end, pad_token_id=end))
    base.save_pretrained(tmp_path / "base")
    path = ["model=hub", f"model.path={tmp_path / 'base'}", "model.tokenizer=bytes"]
    run = trained(pairs, cache, tmp_path / "run", f"adapter={adapter}", "optimizer.lr=1e-2", *path)
    final = tmp_path / "run" / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final if adapter == "none" else tmp_path / "base", num_labels=1)
    if adapter == "lora":
        model = PeftModel.from_pretrained(model, final)
    assert AutoTokenizer.from_pretrained(final).pad_token_id == model.config.pad_token_id == end
    rows = prepare(run.model, run.data, run.resources, kind="pairs").store
    assert rows.row(0)[1][-1] == end
    with torch.no_grad():
        ours = margin_of_held_out_rows(run, lambda ids: model.eval()(input_ids=ids).logits.item())
    assert math.isclose(ours, metrics(str(tmp_path / "run"))[-1]["eval_margin"], rel_tol=1e-4, abs_tol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_separate_head_scores_the_last_hidden_state_of_a_language_model(
    adapter: str, pairs: str, cache: str, tmp_path: Path
) -> None:
    run = trained(pairs, cache, tmp_path, f"adapter={adapter}", "stage.value_head=v_head")
    final = tmp_path / "final"
    head = load_file(final / "value_head.safetensors")
    if adapter == "lora":
        model = PeftModel.from_pretrained(fresh(run, scores=False), final)
    else:
        model = AutoModelForCausalLM.from_pretrained(final)

    def score(ids: torch.Tensor) -> float:
        hidden = model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        return float(hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"])

    with torch.no_grad():
        ours = margin_of_held_out_rows(run, score)
    assert math.isclose(ours, metrics(str(tmp_path))[-1]["eval_margin"], rel_tol=1e-4, abs_tol=1e-5)

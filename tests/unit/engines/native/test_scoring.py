"""Given answers over the paged cache: the numbers of packs without a cache, with what prompts begin with alike computed once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.engines.native.scoring import ScoredText, texts_of
from raytune_llm.engines.requests import Request, Sampling, ScoredToken
from tests.models import VOCABULARY, tiny_llama


class Counting(PolicyRunner):
    """Keeps the sizes of the texts that each pass computes."""

    passes: list[list[int]]

    def scored(self, texts: Sequence[ScoredText]) -> list[ScoredToken]:
        self.passes.append([len(text.ids) - text.computed for text in texts])
        return super().scored(texts)

    def answer_logprobs(self, prompts: Any, answers: Any, slot: int, *, top: int = 0) -> list[list[ScoredToken]]:
        texts = texts_of(prompts, answers, "", self.block_size)
        self.passes.append([len(text.ids) for text in texts])
        return super().answer_logprobs(prompts, answers, slot, top=top)


def engine(num_blocks: int, *, prefix_cache: bool, passes: list[list[int]] | None = None, **settings: Any) -> NativeEngine:
    policy = tiny_llama().eval()
    runner = Counting(policy, num_blocks=num_blocks, block_size=4, device=policy.base.device)
    runner.passes = [] if passes is None else passes
    return NativeEngine(runner, byte_tokenizer(), end_ids=[], max_length=200, prefix_cache=prefix_cache, **settings)


def questions() -> tuple[list[list[int]], list[list[int]]]:
    draw = random.Random(0)
    shots = [draw.randrange(VOCABULARY) for _ in range(41)]
    prompts = [shots + [draw.randrange(VOCABULARY) for _ in range(size)] for size in (3, 9, 1, 6) for _ in range(2)]
    prompts = [prompt for prompt in prompts for _ in range(4)] + [shots[:4], shots[:5], [7]]
    answers = [[draw.randrange(VOCABULARY) for _ in range(1 if number % 8 < 4 else 3)] for number in range(len(prompts))]
    return prompts, answers


@pytest.mark.parametrize(("num_blocks", "shares"), [(200, True), (16, True), (6, False)])
def test_answers_have_the_log_probabilities_of_packs_with_shared_beginnings_computed_once(num_blocks: int, shares: bool):
    prompts, answers = questions()
    passes: list[list[int]] = []
    plain, shared = engine(200, prefix_cache=False), engine(num_blocks, prefix_cache=True, passes=passes, pass_tokens=60)
    shared._max_length = 200
    try:
        expected = plain.answer_logprobs(prompts, answers).result()
        for _ in range(2):
            found = shared.answer_logprobs(prompts, answers, share_prefixes=True).result()
            for own, other in zip(found, expected, strict=True):
                assert [one.logprob for one in own] == pytest.approx([one.logprob for one in other], abs=1e-4)
                assert [one.likeliest for one in own] == [one.likeliest for one in other]
        stats = shared.stats()
        assert (stats.prefix_hits > 0.7 * stats.prefix_queries) == shares
        assert stats.cache_used == 0
        assert any(len(one) > 1 for one in passes)
        assert all(len(one) == 1 or sum(one) <= 60 for one in passes)
    finally:
        plain.close()
        shared.close()


def test_answers_are_generated_between_the_passes_of_one_request():
    prompts, answers = questions()
    passes: list[list[int]] = []
    shared = engine(200, prefix_cache=True, passes=passes, pass_tokens=60)
    try:
        stream = shared.submit(Request(prompt_ids=[3, 4], sampling=Sampling(max_new_tokens=190, ignore_end=True)))
        next(iter(stream))
        began = shared.stats().generated_tokens
        shared.answer_logprobs(prompts, answers, share_prefixes=True).result()
        assert shared.stats().generated_tokens - began >= len(passes) - 1 > 2
        assert len(stream.result().ids) == 190
    finally:
        shared.close()

"""Questions to an engine, in blocks. A question asks for a generated answer, the scores of a given answer, or both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from raytune_llm.engines.engine import Engine
from raytune_llm.engines.requests import Request, Sampling, ScoredToken

BLOCK_QUESTIONS = 16
SCORED_TOKENS = 4096
"""Maximum tokens of a forward pass that scores several given answers."""


@dataclass(frozen=True, slots=True)
class Question:
    prompt_ids: tuple[int, ...]
    given_ids: tuple[int, ...]
    """The given answer, whose log-probabilities are computed; empty: none."""
    adapter: str | None
    sampling: Sampling | None
    """None: no answer is generated."""
    shares_prefix: bool = False
    """Whether many given answers have common beginnings of prompts; see Engine.answer_logprobs."""


@dataclass(frozen=True, slots=True)
class Answered:
    text: str | None
    finish: str | None
    ids: tuple[int, ...]
    """The generated tokens."""
    logprobs: tuple[float, ...]
    """One per token of the given answer, in nats."""
    likeliest: bool = False
    """Whether greedy decoding would generate the given answer."""
    refused: str | None = None
    """Why the engine refused the question."""


Block = Sequence[Question]


class Answering(Protocol):
    max_length: int

    def __call__(self, blocks: Iterable[Block]) -> Iterator[list[Answered]]: ...


def in_blocks(questions: Iterable[Question]) -> Iterator[list[Question]]:
    left = iter(questions)
    while block := list(islice(left, BLOCK_QUESTIONS)):
        yield block


def answer_block(engine: Engine, block: Block) -> list[Answered]:
    """The answers of a block, in its order. Blocks until all are complete."""
    streams: dict[int, Any] = {}
    refused: dict[int, str] = {}
    for number, question in enumerate(block):
        beside = max(len(question.given_ids) - 1, 0 if question.sampling is None else 1)  # a last token is only predicted
        if len(question.prompt_ids) + beside > engine.max_length:
            refused[number] = f"it is longer than {engine.max_length} tokens"
        elif question.sampling is not None:
            streams[number] = engine.submit(
                Request(prompt_ids=question.prompt_ids, sampling=question.sampling, adapter=question.adapter)
            )
    scored = _scored(engine, [(number, one) for number, one in enumerate(block) if one.given_ids and number not in refused])
    answers = []
    for number in range(len(block)):
        completion = streams[number].result() if number in streams else None
        answers.append(
            Answered(
                text=None if completion is None else completion.text,
                finish=None if completion is None else completion.finish,
                ids=() if completion is None else completion.ids,
                logprobs=tuple(token.logprob for token in scored.get(number, ())),
                likeliest=number in scored and all(token.likeliest for token in scored[number]),
                refused=refused.get(number),
            )
        )
    return answers


def _scored(engine: Engine, numbered: list[tuple[int, Question]]) -> dict[int, Sequence[ScoredToken]]:
    alike: dict[tuple[str | None, bool], list[tuple[int, Question]]] = defaultdict(list)
    for number, question in numbered:
        alike[question.adapter, question.shares_prefix].append((number, question))
    waiting: list[tuple[list[int], Future[Any]]] = []
    for (adapter, shares), own in alike.items():
        prompts, given = [list(one.prompt_ids) for _, one in own], [list(one.given_ids) for _, one in own]
        scored = engine.answer_logprobs(prompts, given, adapter, share_prefixes=shares)
        waiting.append(([number for number, _ in own], scored))
    found: dict[int, Sequence[ScoredToken]] = {}
    for numbers, future in waiting:
        for number, tokens in zip(numbers, future.result(), strict=True):
            found[number] = tokens
    return found


def scored_together(numbered: Iterable[tuple[int, Question]]) -> Iterator[list[tuple[int, Question]]]:
    """Groups of consecutive questions that fit one forward pass."""
    group: list[tuple[int, Question]] = []
    tokens = 0
    for number, question in numbered:
        size = len(question.prompt_ids) + len(question.given_ids)
        if group and tokens + size > SCORED_TOKENS:
            yield group
            group, tokens = [], 0
        group.append((number, question))
        tokens += size
    if group:
        yield group

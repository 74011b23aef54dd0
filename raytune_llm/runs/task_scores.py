"""Tasks of lm-evaluation-harness at each evaluation of a run, answered by the policy in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from raytune_llm.engines.batch import BatchEngine
from raytune_llm.engines.harness import EngineLM, load_tasks, run_tasks, scores_of
from raytune_llm.engines.questions import Answered, Block, scored_together
from raytune_llm.engines.requests import Request
from raytune_llm.models.load import positions
from raytune_llm.runs.samples import engine_in_training
from raytune_llm.train.strategies.base import Strategy

MAX_LENGTH = 2048
"""Maximum tokens of a question and its answer, for models that have no maximum of their own."""


class TaskScorer:
    """Scores the policy on the same questions each time. It draws no random numbers, so training is unaffected."""

    def __init__(
        self,
        strategy: Strategy,
        tokenizer: Any,
        names: Sequence[str],
        *,
        max_questions: int | None,
        stop_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        """Raises ConfigError for an unknown task. max_questions: the limit for each task."""
        self._strategy, self._tokenizer, self._max_questions = strategy, tokenizer, max_questions
        self._stop_ids, self._device = stop_ids, device
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._answers = strategy.sharded or self._rank == 0
        """Whether this worker computes answers: all workers if the policy is sharded, else only rank 0."""
        self._tasks = list(load_tasks(names, "train.eval_tasks").values()) if self._answers else []

    def __call__(self) -> dict[str, float]:
        """eval_<task>_<metric> -> score. Collective over all workers, who all get rank 0's scores."""
        shared: list[Any] = [None]
        with self._strategy.averaged(), self._strategy.parts():
            if self._answers:
                shared = [self._scores()]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, src=0, device=self._device if self._device.type == "cuda" else None)
        return shared[0]

    def _scores(self) -> dict[str, float]:
        engine = engine_in_training(self._strategy, self._tokenizer, self._stop_ids, self._device)
        answering = PolicyAnswering(engine, positions(self._strategy.module.base.config) or MAX_LENGTH)
        lm = EngineLM(answering, self._tokenizer, None)
        results = run_tasks(lm, self._tasks, max_questions=self._max_questions, stderrs=False)
        found = scores_of(results) if results else {}  # rank 0's are shared
        named = ((f"eval_{task}_{name}", score.value) for task, scores in found.items() for name, score in scores.items())
        return {name.replace("/", "_"): value for name, value in named}


class PolicyAnswering:
    """Answers questions with a policy in memory, with its adapter in use."""

    def __init__(self, engine: BatchEngine, max_length: int) -> None:
        self._engine, self.max_length = engine, max_length

    def __call__(self, blocks: Iterable[Block]) -> Iterator[list[Answered]]:
        """All blocks are computed together."""
        held = [list(block) for block in blocks]
        questions = [(number, one) for number, one in enumerate(one for block in held for one in block)]
        asked = [(number, Request(prompt_ids=one.prompt_ids, sampling=one.sampling)) for number, one in questions if one.sampling]
        completions = self._engine.generate([request for _, request in asked]) if asked else []
        found = {number: Answered(one.text, one.finish, one.ids, ()) for (number, _), one in zip(asked, completions, strict=True)}
        given = [(number, one) for number, one in questions if one.given_ids]
        sharing = [(number, one) for number, one in given if one.shares_prefix]
        others = scored_together((number, one) for number, one in given if not one.shares_prefix)
        for group, shares in [(sharing, True), *((group, False) for group in others)]:
            prompts, answers = [list(one.prompt_ids) for _, one in group], [list(one.given_ids) for _, one in group]
            scored = self._engine.answer_logprobs(prompts, answers, share_prefixes=shares) if group else []
            for (number, _), tokens in zip(group, scored, strict=True):
                likeliest = all(token.likeliest for token in tokens)
                found[number] = Answered(None, None, (), tuple(token.logprob for token in tokens), likeliest)
        numbers = iter(range(len(questions)))
        for block in held:
            yield [found[next(numbers)] for _ in block]

"""Batch generation in the calling thread, for evaluation and for samples during training.

It runs the native engine's steps without its thread. The policy may be sharded over workers, which must then run each step
together, and training continues once the answers are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from raytune_llm.engines.hf import end_ids
from raytune_llm.engines.native.blocks import BlockPool
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.engines.native.scoring import Waves, texts_of
from raytune_llm.engines.requests import Completion, Request, ScoredToken
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import positions

BLOCK_SIZE = 16
MAX_ROWS = 32
CACHED_TOKENS = 4096
"""The size, in tokens, of the cache for scoring given answers."""
STEP_TOKENS = 2048
"""Maximum tokens of a step: prompts are computed in chunks."""


class BatchEngine:
    """Generates answers with the policy and its active adapter. `generate` restores the policy's train or eval mode, and draws
    nothing from torch's global generators."""

    def __init__(
        self,
        policy: CausalLM,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int] = (),
        device: torch.device,
        max_rows: int = MAX_ROWS,
        runner: Callable[..., PolicyRunner] = PolicyRunner,
        on_answered: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        """stop_ids: tokens that end an answer, in addition to those of the generation config and the tokenizer. max_rows: the
        number of answers that are generated concurrently. on_answered: called while answers are generated, with the number of
        complete ones and of all."""
        self._policy, self._tokenizer, self._device, self._max_rows, self._runner = policy, tokenizer, device, max_rows, runner
        self._end_ids = sorted({*stop_ids, *end_ids(policy.base, tokenizer)})
        self._on_answered = on_answered

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in their order."""
        lengths = sorted((len(request.prompt_ids) + request.sampling.max_new_tokens for request in requests), reverse=True)
        blocks = sum(-(-length // BLOCK_SIZE) for length in lengths[: self._max_rows])
        runner = self._runner(self._policy, num_blocks=blocks, block_size=BLOCK_SIZE, device=self._device)
        engine = NativeEngine(
            runner,
            self._tokenizer,
            end_ids=self._end_ids,
            max_length=min(lengths[0], positions(self._policy.base.config) or lengths[0]),
            max_rows=self._max_rows,
            step_tokens=STEP_TOKENS,
            threaded=False,
        )
        was_training = self._policy.training
        try:
            return engine.generate(requests, lambda left: self._on_answered(len(requests) - left, len(requests)))
        finally:
            engine.close()
            self._policy.train(was_training)

    @torch.no_grad()
    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, share_prefixes: bool = False
    ) -> list[list[ScoredToken]]:
        """The log-probability of each token of each answer, given the prompt and the answer's earlier tokens.

        share_prefixes: common beginnings of prompts are computed once, in passes of at most CACHED_TOKENS tokens or one text. If
        false, everything is computed in one pass.
        """
        texts = texts_of(prompts, answers, "", BLOCK_SIZE) if share_prefixes else []
        num_blocks = -(-max([CACHED_TOKENS, *(len(text.ids) for text in texts)]) // BLOCK_SIZE) if texts else 1
        runner = self._runner(self._policy, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=self._device)
        was_training = self._policy.training
        try:
            if not texts:
                return runner.answer_logprobs(prompts, answers, -1)
            waves = Waves(texts, BlockPool(num_blocks, BLOCK_SIZE), runner, limit=CACHED_TOKENS)
            while waves.left:
                waves.compute(-1)
        finally:
            self._policy.train(was_training)
        tokens = iter(waves.scored())
        return [[next(tokens) for _ in answer] for answer in answers]

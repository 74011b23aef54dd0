"""Samples during training: the policy's greedy answers to the first held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raytune_llm.data.store import Store
from raytune_llm.engines.batch import BatchEngine
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.report.updates import SampledAnswer
from raytune_llm.train.strategies.base import Strategy


class TogetherRunner(PolicyRunner):
    """Generates with a sharded policy. All workers compute its layers together and choose the same tokens."""

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        logits_RV = super().run(pieces)
        if len(logits_RV):
            dist.broadcast(logits_RV, src=0)
        return logits_RV


def engine_in_training(strategy: Strategy, tokenizer: Any, stop_ids: Sequence[int], device: torch.device) -> BatchEngine:
    """An engine over the policy with its current weights. With a sharded policy, all workers must send it the same requests."""
    policy = strategy.module
    assert isinstance(policy, CausalLM), "config/rules.py lets no reward model be asked"
    runner = TogetherRunner if strategy.sharded else PolicyRunner
    return BatchEngine(policy, tokenizer, stop_ids=stop_ids, device=device, runner=runner)


class Sampler:
    """Generates answers to the same rows each time. It draws no random numbers, so training is unaffected."""

    def __init__(
        self,
        strategy: Strategy,
        tokenizer: Any,
        store: Store,
        rows: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self._strategy, self._tokenizer, self._rows = strategy, tokenizer, rows
        self._stop_ids, self._device = stop_ids, device
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        asked = [store.prompt_and_answer(row) for row in rows]
        sampling = Sampling(max_new_tokens=max_new_tokens)
        self._requests = [Request(prompt_ids=prompt.tolist(), sampling=sampling) for prompt, _ in asked]
        self._sources = [store.sources[store.row_sources[row]] if store.sources else "" for row in rows]
        self._texts = [(self._text(prompt), self._text(answer)) for prompt, answer in asked]

    def __call__(self, step: int) -> list[SampledAnswer]:
        """Collective over all workers; rank 0 gets the samples."""
        strategy = self._strategy
        if not strategy.sharded and self._rank > 0:
            return []
        engine = engine_in_training(strategy, self._tokenizer, self._stop_ids, self._device)
        with strategy.parts():
            completions = engine.generate(self._requests)
        return [
            SampledAnswer(step=step, source=source, row=row, prompt=prompt, answer=completion.text.strip(), reference=reference)
            for source, row, (prompt, reference), completion in zip(
                self._sources, self._rows, self._texts, completions, strict=True
            )
        ]

    def _text(self, ids: Any) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()

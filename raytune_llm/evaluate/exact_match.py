"""Exact match: the fraction of held-out rows for which the generated answer equals the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raytune_llm.engines.requests import Completion, Request, Sampling


class Generates(Protocol):
    """The part of an engine that is used here."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """Prompt, answer and reference as texts, without special tokens and without white space at both ends."""

    prompt: str
    reference: str
    answer: str
    correct: bool


@dataclass(frozen=True, slots=True)
class ExactMatch:
    matches: int
    total: int
    samples: tuple[Sample, ...]
    """One a row, in the order of the rows."""

    @property
    def fraction(self) -> float:
        return self.matches / self.total


def exact_match(
    engine: Generates,
    tokenizer: Any,
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    max_new_tokens: int,
    adapter: str | None = None,
) -> ExactMatch:
    """Generate greedy answers and compare them with references. rows: (prompt ids, reference's ids), at least one."""
    prompts, references = zip(*rows, strict=True)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    completions = engine.generate([Request(prompt_ids=prompt, sampling=sampling, adapter=adapter) for prompt in prompts])

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()

    samples = tuple(
        Sample(text(prompt), text(reference), answer := completion.text.strip(), answer == text(reference))
        for prompt, reference, completion in zip(prompts, references, completions, strict=True)
    )
    return ExactMatch(sum(sample.correct for sample in samples), len(samples), samples)

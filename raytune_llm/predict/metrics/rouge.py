from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from raytune_llm.predict.metrics.words import words

TYPES = ("rouge1", "rouge2", "rougeL")


def rouge(answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean F1 over rows of rouge-score's ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), 0 to 1, over our words: without stemming, and
    with each Chinese or Japanese character as a word."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(TYPES), tokenizer=_Words())
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: fmean(score[name].fmeasure for score in scores) for name in TYPES}


class _Words:
    """Our words, with the interface of rouge-score's tokenizers."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)

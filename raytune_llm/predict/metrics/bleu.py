from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytune_llm.predict.metrics.words import cjk_and_kana

CJK, KANA = 0.5, 0.2
"""Shares of words from which a text is taken for Chinese or Japanese, and for Japanese."""


def bleu(answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float | str]:
    """sacrebleu's corpus BLEU, 0 to 100, and the signature that says how it was computed (Post 2018)."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=_tokenizer(references))
    return {"bleu": metric.corpus_score(list(answers), [list(references)]).score, "bleu_signature": str(metric.get_signature())}


def _tokenizer(references: Sequence[str]) -> str:
    """zh makes words of Chinese characters, but leaves kana as they stand together; char makes words of all characters."""
    cjk, kana = cjk_and_kana(references)
    return "13a" if cjk <= CJK else "char" if kana > KANA else "zh"

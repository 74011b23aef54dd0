"""Splitting answers into words: runs of letters and digits in lower case, and single Chinese or Japanese characters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

HAN = r"々〇㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff"
KANA = r"぀-ヿ"
_WORD = re.compile(rf"[{HAN}{KANA}]|[^\W_{HAN}{KANA}]+")
_CJK, _KANA = re.compile(f"[{HAN}{KANA}]"), re.compile(f"[{KANA}]")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def cjk_and_kana(texts: Sequence[str]) -> tuple[float, float]:
    """The share of words that are Chinese or Japanese characters, and that of kana, which are Japanese."""
    found = [word for text in texts for word in words(text)]
    cjk, kana = (sum(bool(kind.fullmatch(word)) for word in found) for kind in (_CJK, _KANA))
    return cjk / max(1, len(found)), kana / max(1, len(found))


def exact_match(answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The fraction that equals the reference, outer white space aside."""
    pairs = zip(answers, references, strict=True)
    return {"exact_match": fmean(answer.strip() == reference.strip() for answer, reference in pairs)}


def f1(answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over rows of the harmonic mean of precision and recall of words, as SQuAD's (Rajpurkar et al. 2016), but with articles
    like any other words. Two texts without words are equal."""
    return {"f1": fmean(_f1(words(answer), words(reference)) for answer, reference in zip(answers, references, strict=True))}


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))

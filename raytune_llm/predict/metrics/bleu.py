from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytune_llm.predict.metrics.words import is_cjk


def bleu(answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float | str]:
    """sacrebleu's corpus BLEU, 0 to 100, and the signature that says how it was computed (Post 2018). Chinese and
    Japanese text is split into characters (zh)."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize="zh" if is_cjk(references) else "13a")
    return {"bleu": metric.corpus_score(list(answers), [list(references)]).score, "bleu_signature": str(metric.get_signature())}

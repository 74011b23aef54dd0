from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

NAMES = {"rouge-1": "predict_rouge-1", "rouge-2": "predict_rouge-2", "rouge-l": "predict_rouge-l"}


def llamafactory(answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The four numbers of LLaMA-Factory's predict, 0 to 100, under its names: F of rouge-chinese over jieba's words, and BLEU-4
    over characters with nltk's third smoothing, each rounded to four digits a row and averaged."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.setLogLevel(logging.WARNING)
    found: dict[str, list[float]] = {"predict_bleu-4": [], **{name: [] for name in NAMES.values()}}
    for answer, reference in zip(answers, references, strict=True):
        said, meant = " ".join(jieba.cut(answer)), " ".join(jieba.cut(reference))
        scores: Any = Rouge().get_scores(said, meant)[0] if said.split() and meant.split() else None
        for theirs, name in NAMES.items():
            found[name].append(0.0 if scores is None else round(scores[theirs]["f"] * 100, 4))
        bleu: Any = sentence_bleu([list(reference)], list(answer), smoothing_function=SmoothingFunction().method3)
        found["predict_bleu-4"].append(round(bleu * 100, 4))
    return {name: fmean(values) for name, values in found.items()}

"""LLaMA-Factory's rule for shortening a row: prompts and answers are both cut at their ends, the longer one more.

The template's own tokens at the ends are cut too.
"""

from __future__ import annotations

import numpy as np

from raytune_llm.data.tokens.tokenize import Tokens


def shares(source: int, target: int, budget: int) -> tuple[int, int]:
    """The number of tokens to keep of a prompt and of its answer, `budget` in all.

    source, target: their lengths in tokens. A part that is shorter than half of the budget is kept in full; otherwise both shrink
    in proportion.
    """
    if 2 * target < budget:
        most = budget
    elif 2 * source < budget:
        most = budget - source
    else:
        most = int(budget * (target / (source + target)))
    kept = min(most, target)
    return max(min(budget - kept, source), 0), kept


def shorten(tokens: Tokens, budget: int, *, last_first: bool) -> Tokens:
    """Keep the starts of prompts and answers, turn by turn, until the budget is spent; last_first: from the last turn backwards.

    Text after the last answer is removed. A turn that the budget does not reach is removed in full; its answer is an empty span.
    """
    ends = tokens.answers[1::2].tolist()
    turns = list(zip([0, *ends[:-1]], tokens.answers[0::2].tolist(), ends, strict=True))
    kept = [(0, 0)] * len(turns)
    for turn in reversed(range(len(turns))) if last_first else range(len(turns)):
        if budget <= 0:
            break
        start, answer, end = turns[turn]
        kept[turn] = shares(answer - start, end - answer, budget)
        budget -= sum(kept[turn])
    pieces: list[np.ndarray] = []
    answers: list[int] = []
    length = 0
    for (start, answer, _), (source, target) in zip(turns, kept, strict=True):
        pieces += (tokens.ids[start : start + source], tokens.ids[answer : answer + target])
        answers += (length + source, length + source + target)
        length += source + target
    return Tokens(np.concatenate(pieces) if pieces else tokens.ids[:0], np.array(answers, dtype=np.int32))

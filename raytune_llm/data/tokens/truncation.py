"""LLaMA-Factory's rule for the tokens of a row that is too long: requests and answers both give way, the longer one more.

Tokens at their ends are cut, the template's own included.
"""

from __future__ import annotations

import numpy as np

from raytune_llm.data.tokens.tokenize import Tokens


def shares(source: int, target: int, budget: int) -> tuple[int, int]:
    """Tokens to keep of a request and of the answer to it, of `budget` in all (LLaMA-Factory's rule).

    An answer below half of the budget stays whole, and so does a request below half of it; else both shrink in proportion.
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
    """The starts of requests and of answers, turn by turn until the budget is spent; from the last turn backwards if last_first.

    What follows the last answer goes. A turn that the budget does not reach goes whole, with its answer (an empty span).
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

from __future__ import annotations

import math


def perplexity(nll: float) -> float:
    """e to the mean negative log-likelihood of a token, in nats; infinite where that overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf

"""What a row of a store asks, and what stands there as the answer: for answers of the model to rows that were held out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TEXT_PROMPT_TOKENS = 32
"""A plain text is a prompt up to so many tokens, or after its half where it is short."""


def last_answer(ids: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last of the flattened trained spans, and what stands before it."""
    start, end = spans[-2:]
    return (ids[:start], ids[start:end]) if start > 0 else _rest_of_text(ids, spans)


def _rest_of_text(ids: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = min(TEXT_PROMPT_TOKENS, (len(ids) + 1) // 2)
    return ids[:at], ids[at:]


def _chosen(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return prompt, chosen


def _labelled(prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return prompt, answer


PROMPTS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "conversations": last_answer,
    "text": _rest_of_text,
    "pairs": _chosen,
    "labeled": _labelled,
    "prompts": _labelled,
}
"""By the kind of store: of a row's lists (Store.row), the ids of the prompt and those of the answer."""
